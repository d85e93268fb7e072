"""Do label words anchor what our own models learn from context? Trains, measures, compares seeds.

python -m experiments.anchors.study --workdir=runs/anchors [--variants=fine,gshard,dense]
  [--seeds=5] [--steps=N] [--sets=24] [--noise=20] [--jobs=2] [--out=experiments/anchors]

Every variant of configs/episodes.py is trained with every seed, in the page's three stages, and
measured by experiments.anchors, its re-weighting and confusion on harder episodes, some words of
which come from other classes; a killed command goes on. Intervals are over seeds, of each run's
means. results.json, the tables in README.md and the figures go to --out.
"""

from collections.abc import Sequence

from absl import flags

from experiments import anchors
from experiments.common import cli, local_jobs


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds a workdir per variant and seed')
  flags.DEFINE_list(
    'variants', list(anchors.VARIANTS), 'variants of configs/episodes.py; fine = the page'
  )
  flags.DEFINE_list('seeds', ['5'], 'values of train.seed, or how many')
  flags.DEFINE_integer('steps', 0, 'training steps of each stage; 0 = as the page says')
  flags.DEFINE_integer('sets', 24, 'demonstration sets')
  flags.DEFINE_integer('queries', 16, 'queries of each set')
  flags.DEFINE_integer('noise', 20, 'percent of foreign words in an item of harder episodes')
  local_jobs.define_flags()
  cli.path_flag('out', 'experiments/anchors', 'directory of README.md and results.json')


def main(argv: Sequence[str]):
  """Trains, measures, writes."""
  from experiments.anchors import runs

  runs.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
