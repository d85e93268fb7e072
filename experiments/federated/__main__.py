"""Trains federated on long-tailed classes: RedGrape, its ablations, and the methods beside it.

python -m experiments.federated --method=redgrape --imbalance=100 --alpha=1.0 --clients=10 \
  --workdir=runs/redgrape [--seeds=5] [--dataset=mnist --data_dir=DIR] [--devices=2]

Writes to the workdir: the settings, the state after every few rounds (a killed command goes on from
there), results.json, and a report (report.md, report.html) with the curve and the accuracies of
head, middle and tail classes. Several seeds are one compiled program. The data set digits needs the
extra `imbalance`; mnist, cifar10 and cifar100 (binary version) are read from local files.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs
from experiments.federated import setting_flags


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory of the run')
  setting_flags.define()
  cli.path_flag('data_dir', '', 'directory with the published files of the data set')
  flags.DEFINE_list('seeds', ['1'], 'seeds, or how many')
  flags.DEFINE_integer('every', 10, 'rounds between two points of the curve')
  flags.DEFINE_integer('devices', 1, 'over which the clients of a round are split')


def main(unused_argv: Sequence[str]):
  """Trains and writes the report."""
  import pathlib

  from experiments.federated import report
  from moe_jax.federated import run

  values, settings = flags.FLAGS, setting_flags.read()
  workdir = pathlib.Path(cli.required('workdir'))
  seeds = local_jobs.seeds(values.seeds)
  curve = run.run(
    settings,
    seeds,
    workdir,
    data_dir=values.data_dir,
    every=values.every,
    devices=values.devices,
  )
  print(report.write(settings, seeds, curve, workdir))


if __name__ == '__main__':
  cli.run(main, define_flags)
