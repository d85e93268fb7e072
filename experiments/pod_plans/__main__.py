"""Do DeepSeek's models fit on TPU pods, and what bounds a step there?

Compiles the train step of each model for each topology, one after the other, and writes
results.json and the tables of the README. What was compiled before comes from the cache.

python -m experiments.pod_plans [--only=deepseek_v2,v5p] [--estimate]
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  flags.DEFINE_string(
    'only', '', 'only rows whose name holds all of these words, separated by commas'
  )
  flags.DEFINE_bool('estimate', False, 'count from shapes, to see quickly what may fit')


def main(argv: Sequence[str]):
  """Plans every row, and writes what is known after each."""
  from experiments.pod_plans import plans

  plans.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
