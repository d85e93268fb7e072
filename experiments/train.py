"""Trains a config page on its corpus; the same command again resumes.

python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart \
  [--config.optim.peak_lr=1e-3 ...] [--allow_config_change]
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

import tqdm
from absl import flags

from experiments import cli
from moe_jax import report, run


def define_flags():
  """Flags of this command."""
  cli.config_flag()
  cli.workdir_flag('directory of the run; made if absent')
  flags.DEFINE_bool('allow_config_change', False, 'continue a run of another config')


def _say(line: str):
  tqdm.tqdm.write(line, file=sys.stdout)
  sys.stdout.flush()


def main(unused_argv: Sequence[str]):
  """Trains, then reports; an interrupted run says how to go on."""
  cfg = cli.resolve(flags.FLAGS.config)
  workdir = pathlib.Path(cli.required('workdir'))
  allow = flags.FLAGS.allow_config_change
  trained, corpus = run.run_training(
    cfg, workdir, allow_config_change=allow, argv=sys.argv, say=_say
  )
  if not trained.interrupted_by:
    report.finish(trained, corpus, workdir, _say)
    return
  again = 'python -m experiments.train ' + shlex.join(sys.argv[1:])
  _say(
    f'stopped by {trained.interrupted_by} after step {trained.step}, which is saved; '
    f'resume with: {again}'
  )


if __name__ == '__main__':
  cli.run(main, define_flags)
