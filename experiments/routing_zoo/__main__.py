"""Trains every router of `configs/routing.py` alike, times them, and writes the table.

python -m experiments.routing_zoo --workdir=runs/zoo [--jobs=2] [--seeds=0,1,2] [--names=...]
  [--steps=N] [--out=experiments/routing_zoo]

Three parts: train and evaluate each (router, seed), which skips what is done, so that a killed
command goes on; time the training steps of all routers in turns, so that a busy moment of the
machine hits them all; write results.json, the table in README.md and the figure into --out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds a workdir per router and seed')
  flags.DEFINE_list('names', [], 'variants of configs/routing.py; without, all but ablations')
  flags.DEFINE_list('seeds', ['3'], 'values of train.seed, or how many')
  flags.DEFINE_integer('steps', 0, 'training steps; 0 = as the page says')
  local_jobs.define_flags()
  cli.path_flag('out', 'experiments/routing_zoo', 'directory of README.md and results')


def main(argv: Sequence[str]):
  """Trains, times, writes."""
  from experiments.routing_zoo import study

  study.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
