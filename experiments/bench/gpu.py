"""Everything that wants a GPU, in one call: checks, measures and profiles all variants.

python -m experiments.bench.gpu [--out=experiments/bench/results/gpu] [--minutes=9] [--only=words]
  [--toy]

Every result is written when it is there, so that a time limit loses nothing. What no longer fits
into the minutes is skipped and said to be; what fails is written down with its message, the rest
goes on, and the command ends with status 1. --toy runs all of it at toy sizes on any platform.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli

HERE = pathlib.Path(__file__).parent


def define_flags():
  """Flags of this command."""
  cli.path_flag('out', str(HERE / 'results' / 'gpu'), 'directory of the results')
  flags.DEFINE_float('minutes', 9, 'time for everything')
  flags.DEFINE_list('only', [], 'parts to run; an unknown name lists them; none = all')
  flags.DEFINE_bool('toy', False, 'toy sizes, on any platform')


def main(argv: Sequence[str]) -> int:
  """Measures and writes; status 1 if something failed."""
  from experiments.bench import gpu_parts

  return gpu_parts.main(argv)


if __name__ == '__main__':
  sys.exit(cli.run(main, define_flags))
