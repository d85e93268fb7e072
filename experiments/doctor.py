"""Looks whether this machine can train here: versions, devices, disk, memory, locks, two steps.

python -m experiments.doctor [--workdir=runs/a] [--notrain]

A line per fact; what is wrong is followed by what to do, and ends the command with status 1.
"""

import pathlib
import tempfile
from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  cli.path_flag('workdir', '.', 'where runs are to be written')
  flags.DEFINE_bool('train', True, 'take two steps of the page configs/smoke.py')


def main(unused_argv: Sequence[str]) -> int:
  """Prints what was found; returns 1 if something is wrong."""
  from moe_jax.runs import checkup

  found = checkup.facts(pathlib.Path(flags.FLAGS.workdir))
  lines = checkup.judge(found)
  for line in lines:
    print(line.text())
  if flags.FLAGS.train:
    with tempfile.TemporaryDirectory() as directory:
      lines.append(checkup.try_training(pathlib.Path(directory)))
    print(lines[-1].text())
  wrong = sum(bool(line.remedy) for line in lines)
  print(f'{wrong} of {len(lines)} are wrong' if wrong else 'all is well')
  return 1 if wrong else 0


if __name__ == '__main__':
  cli.run(main, define_flags)
