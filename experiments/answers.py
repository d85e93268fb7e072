"""How many held-out questions a run answers rightly: exact match, with its interval.

python -m experiments.answers --workdir=runs/sft [--n=256 --max_new_tokens=64] [--show=3] [--json]
python -m experiments.answers --workdir=runs/base --like=runs/sft

The questions are the held-out conversations of the run's own data; with --like those of another
run, so that a model can be asked before it was tuned. Answers are written greedily. Programs
(data.source='programs') are run against hidden tests in a sandbox, which is printed.
"""

import contextlib
import json
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from moe_jax import errors


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run, or of a downloaded checkpoint', bucket=True)
  cli.adapter_flag()
  cli.path_flag('like', '', 'directory of the run whose questions are asked; its own without')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  flags.DEFINE_integer('n', 256, 'questions at most')
  flags.DEFINE_integer('max_new_tokens', 64, 'tokens of an answer at most')
  flags.DEFINE_integer('show', 0, 'questions that are shown with their answers')
  flags.DEFINE_integer('workers', 2, 'processes that run programs')
  flags.DEFINE_bool('unsafe_rewards', False, 'run programs without isolation')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def main(unused_argv: Sequence[str]):
  """Prints the share that is right."""
  from moe_jax.api import load
  from moe_jax.post_training import answers
  from moe_jax.runs import trained_run, working_directory
  from moe_jax.storage import fetch

  values, workdir = flags.FLAGS, cli.required('workdir')
  for name in ('n', 'max_new_tokens', 'workers'):
    errors.require(values[name].value > 0, f'--{name}={values[name].value} must be positive')
  like = trained_run.read_config(values.like) if values.like else None
  asked = fetch.local(values.like or workdir, '--like' if values.like else '--workdir')
  loaded = load.load(workdir, step=values.step, adapter=values.adapter, flag='--workdir')
  data = working_directory.resolved(like or loaded.config, asked).data
  questions = answers.questions(data, values.n)
  shown: list[str] = []

  def tell(question: answers.Question, text: str, right: bool):
    if len(shown) < values.show:
      mark = 'right' if right else f'wrong, the answer is {question.answer!r}'
      shown.append(f'{question.prompt[-1].content!r}\n  -> {text!r} ({mark})')

  with _rewards(data.source) as rewards:
    found = answers.measure(loaded, questions, data, values.max_new_tokens, tell, rewards)
    isolation = {} if rewards is None else {'isolation': rewards.isolation}
  if values.json:
    print(json.dumps({'step': loaded.step} | found.as_dict() | isolation))
    return
  shown += [f'sandbox: {text}' for text in isolation.values()]
  print('\n'.join([*shown, f'step={loaded.step} {found}']))


def _rewards(source: str) -> contextlib.AbstractContextManager:
  """What runs answers that are programs, or None."""
  from moe_jax.rewards import pool

  if source != 'programs':
    return contextlib.nullcontext()
  values = flags.FLAGS
  options = {'program': {'unsafe': values.unsafe_rewards}}
  return pool.RewardPool('program', values.workers, defaults=options)


if __name__ == '__main__':
  cli.run(main, define_flags)
