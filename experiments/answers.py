"""How many held-out questions a run answers rightly, by the answers given, with an interval.

python -m experiments.answers --workdir=runs/sft [--n=256 --max_new_tokens=64] [--show=3] [--json]
python -m experiments.answers --workdir=runs/base --like=runs/sft
python -m experiments.answers --workdir=runs/grpo --against=runs/sft --samples=4

The questions are the held-out conversations of the run's own data; with --like those of another
run, so that a model can be asked before it was tuned. Answers are written greedily; --samples draws
some more at temperature 1. --against asks another run the same questions and prints the difference,
paired by question. Programs (data.source='programs') are run against hidden tests in a sandbox,
which is printed.
"""

import contextlib
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors

if TYPE_CHECKING:
  from moe_jax.api import run as run_lib
  from moe_jax.config import schema
  from moe_jax.post_training import answers as answers_lib
  from moe_jax.rewards import pool as pool_lib


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run, or of a downloaded checkpoint', bucket=True)
  cli.adapter_flag()
  cli.path_flag('like', '', 'directory of the run whose questions are asked; its own without')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  cli.path_flag('against', '', 'directory of another run, which is asked the same questions')
  flags.DEFINE_integer('samples', 0, 'answers drawn to each question, beside the greedy one')
  flags.DEFINE_integer('n', 256, 'questions at most')
  flags.DEFINE_integer(
    'max_new_tokens',
    None,
    'tokens of an answer at most; 64, or what a row has room for',
  )
  flags.DEFINE_integer('show', 0, 'questions that are shown with their answers')
  flags.DEFINE_integer('workers', 2, 'processes that run programs')
  flags.DEFINE_bool('unsafe_rewards', False, 'run programs without isolation')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


class _Asked(NamedTuple):
  """What a run has answered."""

  found: 'answers_lib.Accuracy'  # of the greedy answers
  greedy: list[float]  # [n] 1 where that answer is right
  sampled: list[float]  # [n] share of the drawn ones that are; empty without --samples


def main(unused_argv: Sequence[str]):
  """Prints the share that is right."""
  from moe_jax.analysis import paired
  from moe_jax.api import load
  from moe_jax.post_training import answers
  from moe_jax.runs import trained_run, working_directory
  from moe_jax.storage import fetch

  values, workdir = flags.FLAGS, cli.required('workdir')
  for name in ('n', 'max_new_tokens', 'workers'):
    given = values[name].value
    errors.require(given is None or given > 0, f'--{name}={given} must be positive')
  errors.require(values.samples >= 0, f'--samples={values.samples} must be 0 (none) or more')
  like = trained_run.read_config(values.like, flag='--like') if values.like else None
  asked = fetch.local(values.like or workdir, '--like' if values.like else '--workdir')
  loaded = load.load(workdir, step=values.step, adapter=values.adapter, flag='--workdir')
  data = working_directory.resolved(like or loaded.config, asked).data
  if data.source != 'programs':
    cli.refuse_idle(('workers', 'unsafe_rewards'), f'on questions of data.source={data.source!r}')
  questions = answers.questions(data, values.n)
  other = load.load(values.against, flag='--against') if values.against else None
  most = values.max_new_tokens or min(
    answers.room(run.config.model, run.tokenizer, questions, data)
    for run in (loaded, other)
    if run is not None
  )
  shown: list[str] = []

  with _rewards(data.source) as rewards:
    here = _ask(loaded, questions, data, most, rewards, shown)
    record = {'step': loaded.step} | here.found.as_dict()
    if rewards is not None:
      record['isolation'] = rewards.isolation
      shown.append(f'sandbox: {rewards.isolation}')
    shown.append(f'step={loaded.step} {here.found}')
    if values.samples:
      record['sampled_share'] = statistics.fmean(here.sampled)
      shown.append(f'drawn, {values.samples} to each: {record["sampled_share"]:.1%} right')
    if other is not None:
      there = _ask(other, questions, data, most, rewards, [])
      for name in ('greedy', 'sampled') if values.samples else ('greedy',):
        gained = paired.difference(getattr(here, name), getattr(there, name))
        record[f'{name}_gain'] = [gained.mean, gained.low, gained.high]
        shown.append(f'share right against {values.against}, {name}: {gained.text()}')
  if values.json:
    json_output.show(record)
  else:
    print('\n'.join(shown))


def _ask(
  loaded: 'run_lib.Run',
  questions: 'Sequence[answers_lib.Question]',
  data: 'schema.DataConfig',
  most: int,
  rewards: 'pool_lib.RewardPool | None',
  shown: list[str],
) -> _Asked:
  """Asks a run all questions; the first --show are told in lines behind `shown`."""
  from moe_jax.inference import sampling
  from moe_jax.post_training import answers

  values, rights = flags.FLAGS, []

  def tell(question: answers.Question, text: str, right: bool):
    rights.append(float(right))
    if len(shown) < values.show and len(rights) <= len(questions):
      mark = 'right' if right else f'wrong, the answer is {question.answer!r}'
      shown.append(f'{question.prompt[-1].content!r}\n  -> {text!r} ({mark})')

  total = len(questions)
  found = answers.measure(loaded, questions, data, most, tell, rewards)
  for number in range(values.samples):
    drawn = sampling.Sampling(temperature=1.0, seed=number * total)
    answers.measure(loaded, questions, data, most, tell, rewards, drawn)
  sampled = [statistics.fmean(rights[i::total][1:]) for i in range(total) if values.samples]
  return _Asked(found, rights[:total], sampled)


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
