"""Training from the command line, for the commands that train a config page."""

import shlex
import sys

import tqdm
from absl import flags

from experiments.common import cli
from moe_jax import errors
from moe_jax.config import parse, schema


def define_flags():
  """Flags of a command that trains."""
  cli.config_flag()
  cli.workdir_flag('directory of the run; made if absent', bucket=True)
  flags.DEFINE_bool('allow_config_change', False, 'continue a run of another config')
  flags.DEFINE_list('profile_steps', None, 'first and last step to profile, into WORKDIR/profile')
  cli.distributed_flags()


def _profile_steps() -> tuple[int, int] | None:
  given = flags.FLAGS.profile_steps
  errors.require(
    given is None or len(given) == 2 and all(word.isdecimal() for word in given),
    f'--profile_steps={",".join(given or ())} must be two numbers; give for example 10,13',
  )
  return given and (int(given[0]), int(given[1]))


def _say(line: str):
  tqdm.tqdm.write(line, file=sys.stdout)
  sys.stdout.flush()


def train(cfg: schema.Config, module: str):
  """Trains, then reports; an interrupted run says how to go on.

  Args:
    cfg: of the flag `config`.
    module: of the command, which the same line goes on with.
  """
  import jax

  from moe_jax.interop import start_weights
  from moe_jax.post_training import stages
  from moe_jax.processes import agreement
  from moe_jax.runs import final_report, run_place, terminal, train_run

  workdir = cli.required('workdir')
  allow, say = flags.FLAGS.allow_config_change, terminal.Terminal(_say)
  cli.start_processes(
    {'config': parse.to_dict(cfg), 'workdir': workdir, 'allow_config_change': allow}
  )
  with run_place.opened(workdir, '--workdir', say) as place:
    trained, corpus = train_run.run_training(
      cfg,
      place.path,
      parts=place.parts,
      allow_config_change=allow,
      argv=sys.argv,
      say=say,
      profile_steps=_profile_steps(),
      open_weights=start_weights.of,
      stage=stages.of(cfg),
    )
    if not trained.interrupted_by:
      final_report.finish(trained, corpus, place.path, say)
      return
  if not agreement.is_first():
    return
  # Every process has a number of its own, the rest of the command is the same.
  arguments = [a for a in sys.argv[1:] if not a.startswith('--process_id=')]
  again = f'python -m {module} ' + shlex.join(arguments)
  where = 'on every process ' if jax.process_count() > 1 else ''
  say(
    f'stopped by {trained.interrupted_by} after step {trained.step}, which is saved; '
    f'resume {where}with: {again}'
  )
