"""How much memory and time does a conversion take, and does it give the files back?

Writes a checkpoint with the shapes of DeepSeek-V2-Lite and fewer layers, imports it, exports it
again and compares the two sets of files bit by bit. The commands run in processes of their own and
report their peaks.

python -m experiments.convert_memory --workdir=runs/convert_memory [--layers=10]
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('scratch directory, which is deleted at the end')
  flags.DEFINE_integer('layers', 10, 'layers; 10 are 11.6 GB, and three times that is written')


def main(argv: Sequence[str]):
  """Converts there and back, compares, and writes results.json."""
  from experiments.convert_memory import there_and_back

  there_and_back.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
