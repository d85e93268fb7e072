"""Compares all methods over imbalances and clients' shares, paired by seed, and grades the claims.

python -m experiments.federated.study --workdir=runs/federated [--seeds=100,101,102,103,104] \
  [--methods=fedavg,redgrape] [--imbalances=10,50,100] [--alphas=0.1,1] [--out=DIR]

A run per method and setting, all seeds in one program; a killed command goes on. Writes
results.json, comparison.png, curves.png and the tables in README.md to --out.
`python -m experiments.federated` trains a single one.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from experiments.federated import setting_flags
from moe_jax import errors
from moe_jax.federated import methods


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds a directory per run')
  cli.path_flag('out', 'experiments/federated', 'directory of the tables and pictures')
  flags.DEFINE_list('methods', list(methods.METHODS), 'methods to compare')
  flags.DEFINE_list('imbalances', ['10', '50', '100'], 'values of --imbalance')
  flags.DEFINE_list('alphas', ['0.1', '1'], 'values of --alpha')
  flags.DEFINE_list('seeds', ['5'], 'seeds, or how many')
  flags.DEFINE_integer('every', 10, 'rounds between two points of the curves')
  flags.DEFINE_integer('devices', 1, 'over which the clients of a round are split')
  cli.path_flag('data_dir', '', 'directory with the published files of the data set')
  setting_flags.define(without=setting_flags.OF_STUDY)


def main(unused_argv: Sequence[str]):
  """Trains what is not there yet, and writes the comparison."""
  known = methods.METHODS
  for name in flags.FLAGS.methods:
    errors.require(
      name in known,
      f'--methods={name} must be among {", ".join(known)}{errors.did_you_mean(name, known)}',
    )
  from experiments.federated import comparison

  comparison.run_study()


if __name__ == '__main__':
  cli.run(main, define_flags)
