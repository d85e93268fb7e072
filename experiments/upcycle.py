"""Makes a mixture of experts out of a trained dense run; experiments.train then goes on from it.

python -m experiments.upcycle --from=runs/dense --config=configs/quickstart.py --workdir=runs/moe \
  [--step=200] [--noise=0.0] [--config.data.tokenizer=runs/dense/tokenizer.json ...]
"""

import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  cli.config_flag()
  cli.workdir_flag('directory of the new run; made if absent', bucket=True)
  cli.path_flag('from', None, 'directory of a trained dense run', bucket=True)
  flags.DEFINE_integer('step', None, 'checkpoint of it; the newest whole one if not given')
  flags.DEFINE_float('noise', 0.0, 'noise on the experts, as a multiple of the dense weights')


def main(unused_argv: Sequence[str]):
  """Writes the workdir, and says how to train in it."""
  from moe_jax.runs import upcycle_run

  values = flags.FLAGS
  source, workdir = cli.required('from'), cli.required('workdir')
  upcycle_run.create(
    source,
    values.step,
    cli.resolve(values.config),
    workdir,
    noise=values.noise,
    argv=sys.argv,
  )
  print(
    f'go on with experiments.train, --workdir={workdir} and the same --config (and overrides of it)'
  )


if __name__ == '__main__':
  cli.run(main, define_flags)
