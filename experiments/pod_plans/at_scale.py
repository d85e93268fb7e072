"""Best meshes, cost, goodput, slices, long rows and pipelines of DeepSeek's models, on paper.

Everything is counted from shapes, nothing is compiled; minutes on a laptop. Writes the tables of
AT_SCALE.md, and their figures to at_scale.json.

python -m experiments.pod_plans.at_scale [--only=best,goodput,slices,lengths,pipelines]
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  flags.DEFINE_list('only', [], 'names of the tables to write; default: all')


def main(argv: Sequence[str]):
  """Makes the tables, and writes each when it is done."""
  from experiments.pod_plans import scale_tables

  scale_tables.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
