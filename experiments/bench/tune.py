"""Measures the tiles of tokamax's kernels on this GPU for the shapes of our models.

python -m experiments.bench.tune [--minutes=60] [--only=words] [--out=configs/tuned]

Writes OUT/<kind of device>.json, which later runs on such a device read
(`moe_jax.devices.tokamax_tiles`).
It is whole after each kernel; a kernel that it has already is not measured again, so that the
command can be repeated until it has nothing to do. Some hundred tile choices are compiled and timed
per kernel and shape, which takes minutes each; random group sizes stand for those of a router.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  flags.DEFINE_float('minutes', 60, 'begin no kernel after them')
  flags.DEFINE_list('only', [], 'words that the name of a program must hold, such as 16b,tgmm')
  cli.path_flag('out', '', 'directory of the file; without, where the library looks for it')
  flags.DEFINE_bool('toy', False, "toy shapes and tokamax's XLA forms, on any platform")


def main(argv: Sequence[str]):
  """Measures and says what is left."""
  from experiments.bench import tune_tiles

  tune_tiles.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
