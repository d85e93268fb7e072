"""Does ReNode help where examples are texts: weights of a graph of embeddings, in fine-tuning?

python -m experiments.topology.bridge --base=runs/quickstart --workdir=runs/bridge [--seeds=5]
  [--steps=150] [--labels=40] [--per_package=100] [--neighbors=10] [--out=experiments/topology]

Functions of the standard library are told apart by their packages: a run is tuned to name the
package. Nodes of the graph are all functions, joined with those whose vectors (`Run.embed`) are
nearest; a seed chooses the labelled ones. Arms: every labelled function equally often; in
proportion to ReNode's weights; to those by ranks within each package. A run is a directory of
--workdir: a command given again does what is left. Table and bridge.json go to --out.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs
from moe_jax import errors


def define_flags():
  """Defines the command's flags."""
  cli.path_flag('base', None, 'run that is tuned and whose vectors make the graph')
  cli.workdir_flag('directory that holds a directory per run')
  flags.DEFINE_list('seeds', ['5'], 'seeds, or how many')
  flags.DEFINE_integer('steps', 150, 'optimizer steps of a run')
  flags.DEFINE_integer('labels', 40, 'labelled functions of each package')
  flags.DEFINE_integer('per_package', 100, 'functions of each package, labelled and held out')
  flags.DEFINE_integer('neighbors', 10, 'nearest functions that each is joined with')
  cli.path_flag('out', 'experiments/topology', 'directory of bridge.json and README.md')


def main(unused_argv: Sequence[str]):
  """Tunes what is not there yet, and writes the table."""
  values = flags.FLAGS
  base, workdir = cli.required('base'), pathlib.Path(cli.required('workdir'))
  errors.require(
    1 <= values.labels < values.per_package,
    f'--labels={values.labels} must be at least 1 and below --per_package={values.per_package}, so '
    'that functions of every package are held out',
  )
  errors.require(values.steps >= 1, f'--steps={values.steps} must be at least 1')
  seeds = local_jobs.seeds(values.seeds)
  from experiments.topology import weighted_tuning

  weighted_tuning.run_study(base, workdir, seeds, pathlib.Path(values.out))


if __name__ == '__main__':
  cli.run(main, define_flags)
