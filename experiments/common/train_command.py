"""Training from the command line, for the commands that train a config page."""

import re
import shlex
import signal
import sys
from collections.abc import Sequence

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


def train(cfg: schema.Config, module: str) -> int:
  """The exit status, after training: 0 and a report, or that of a signal and how to go on.

  A scheduler that looks at nothing else takes 0 for the end of the work.

  Args:
    cfg: of the flag `config`.
    module: of the command, which the same line goes on with.
  """
  import jax

  from moe_jax.interop import start_weights
  from moe_jax.post_training import stages
  from moe_jax.processes import agreement
  from moe_jax.runs import final_report, run_place, terminal, train_run, working_directory

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
      stage=stages.of(working_directory.reading(cfg, place.path)),
    )
    if not trained.interrupted_by:
      final_report.finish(trained, corpus, place.path, say)
      return 0
  if agreement.is_first():
    again = f'python -m {module} ' + shlex.join(_of_all_processes(sys.argv[1:]))
    say(stopped(trained.interrupted_by, trained.step, again, jax.process_count()))
  return 128 + signal.Signals[trained.interrupted_by]


def stopped(signal_name: str, step: int, again: str, num_processes: int = 1) -> str:
  """The last line of an interrupted run, by which docs/launch/slurm.sbatch knows one."""
  where = 'on every process ' if num_processes > 1 else ''
  return f'stopped by {signal_name} after step {step}, which is saved; resume {where}with: {again}'


def _of_all_processes(arguments: Sequence[str]) -> list[str]:
  """The arguments without --process_id: every process has a number of its own."""
  kept, words = [], iter(arguments)
  for word in words:
    if re.fullmatch('--?process_id', word):
      next(words, None)  # its value
    elif not re.match('--?process_id=', word):
      kept.append(word)
  return kept
