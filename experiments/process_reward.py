"""Math-Shepherd: labels of steps by completion, models that judge steps, the best of many answers.

python -m experiments.process_reward label --workdir=runs/reasoner [--questions=128] \
  [--solutions=4] [--completions=8] --out=runs/labels.jsonl
python -m experiments.process_reward train --config=configs/process_reward.py \
  --config.init_from=runs/reasoner --config.objective.process_reward.labels=runs/labels.jsonl \
  --workdir=runs/prm      (a judge of whole solutions: --config=configs/process_reward.py:outcome)
python -m experiments.process_reward verify --workdir=runs/reasoner --prm=runs/prm --orm=runs/orm \
  [--questions=128] [--candidates=16] --out=runs/verified.json

`label` writes solutions to training questions, completes each of their beginnings N times and says
how the labels agree with the truth where the task can check steps; `verify` answers held-out
questions, chooses by votes and by the judges' scores, and prints right answers by N.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common import cli, train_command
from moe_jax import atomic_files, errors

ACTIONS = ('label', 'train', 'verify')


def define_flags():
  """Flags of this command."""
  train_command.define_flags()
  flags.DEFINE_integer('questions', 128, 'label, verify: questions at most')
  flags.DEFINE_integer('solutions', 4, 'label: solutions sampled of each question')
  flags.DEFINE_integer('completions', 8, 'label: completions of each beginning of a solution')
  flags.DEFINE_integer('candidates', 16, 'verify: answers of each question; a power of two')
  flags.DEFINE_float('temperature', 1.0, 'label, verify: of sampling')
  flags.DEFINE_integer(
    'max_new_tokens',
    None,
    'label, verify: tokens of an answer at most; 64, or what a row has room for',
  )
  flags.DEFINE_integer('seed', 0, 'label, verify: decides all draws')
  cli.path_flag('prm', '', 'verify: run that judges steps')
  cli.path_flag('orm', '', 'verify: run that judges solutions')
  cli.path_flag('out', '', 'label, verify: file that is written')


def main(unused_argv: Sequence[str], action: str) -> int:
  """Does what the action says."""
  if action == 'train':
    cfg = cli.resolve(flags.FLAGS.config)
    errors.require(
      cfg.objective.kind == 'process_reward',
      f"config.objective.kind={cfg.objective.kind!r} must be 'process_reward' here; take "
      'configs/process_reward.py',
    )
    return train_command.train(cfg, 'experiments.process_reward train')
  values = flags.FLAGS
  for name in ('questions', 'solutions', 'completions', 'candidates', 'max_new_tokens'):
    given = values[name].value
    errors.require(given is None or given > 0, f'--{name}={given} must be positive')
  errors.require(
    values.temperature > 0, f'--temperature={values.temperature} must be positive; 1 is usual'
  )
  out = pathlib.Path(cli.required('out'))
  if action == 'label':
    _label(out)
  else:
    _verify(out)
  return 0


def _opened(workdir: str, heldout: bool) -> tuple[Any, Any]:
  """(a writer of answers, questions of the data that its run was tuned on)."""
  from moe_jax.post_training import answers, solutions
  from moe_jax.runs import trained_run, working_directory
  from moe_jax.storage import fetch

  values = flags.FLAGS
  run = trained_run.load(workdir)
  data = working_directory.resolved(run.cfg, fetch.local(workdir, '--workdir')).data
  questions = answers.questions(data, values.questions, heldout=heldout, flag='--questions')
  room = answers.room(run.cfg.model, run.tokenizer, questions, data)
  writer = solutions.Writer(
    run,
    data,
    temperature=values.temperature,
    max_new_tokens=values.max_new_tokens or room,
    seed=values.seed,
  )
  return writer, questions


def _bar(what: str, total: int) -> Any:
  import tqdm

  return tqdm.tqdm(desc=what, total=total, disable=None)


def _label(out: pathlib.Path):
  from moe_jax.post_training import solutions, step_labels, verification

  values = flags.FLAGS
  writer, questions = _opened(cli.required('workdir'), heldout=False)
  with _bar('questions', len(questions)) as bar:
    groups = writer.sample(questions, values.solutions, tell=lambda n: bar.update(n - bar.n))
  found = solutions.distinct(groups)
  with _bar('beginnings', 0) as bar:
    labelled = writer.label(found, values.completions, tell=lambda n: bar.update(n - bar.n))
  errors.require(
    bool(labelled),
    f'--questions={values.questions}: no solution has a step and ends within '
    f'--max_new_tokens; allow more, or tune the run on solutions first',
  )
  out.parent.mkdir(parents=True, exist_ok=True)
  step_labels.write(out, labelled)
  steps = sum(len(one.ends) for one in labelled)
  good = sum(sum(one.hard) for one in labelled)
  right = sum(one.right for one in labelled)
  print(
    f'{out}: {len(labelled)} solutions of {len(questions)} questions, {right} right; {steps} '
    f'steps, {good} labelled good'
  )
  if any(one.truth is None for one in labelled):
    return
  before_last = [(o, t) for one in labelled for o, t in zip(one.outcomes[:-1], one.truth or ())]
  outcomes, truth = [o for o, _ in before_last], [t for _, t in before_last]
  counts = [n for n in (1, 2, 4, 8, 16, 32) if n < values.completions] + [values.completions]
  print('hard labels against true steps, last steps left out:')
  for n, one in verification.label_quality(outcomes, truth, counts).items():
    quality = one.as_dict()
    print(
      f'  N={n}: precision {quality["precision"]:.1%} recall {quality["recall"]:.1%} '
      f'accuracy {quality["accuracy"]:.1%} of {one.steps}'
    )


def _verify(out: pathlib.Path):
  from moe_jax.post_training import answers, candidates, verification
  from moe_jax.runs import trained_run

  values = flags.FLAGS
  judges = {kind: trained_run.load(cli.required(kind), flag=f'--{kind}') for kind in ('prm', 'orm')}
  for kind, judge in judges.items():
    process = judge.cfg.objective.process_reward
    errors.require(
      process.outcome == (kind == 'orm'),
      f'--{kind}={values[kind].value} was trained with objective.process_reward.outcome='
      f'{process.outcome}; give a judge of {"solutions" if kind == "orm" else "steps"}',
    )
  writer, questions = _opened(cli.required('workdir'), heldout=True)
  with _bar('questions', len(questions)) as bar:
    groups = writer.sample(questions, values.candidates, tell=lambda n: bar.update(n - bar.n))
  greedy = sum(one[0].right for one in writer.sample(questions, 1, greedy=True))
  size = values.candidates
  pools = candidates.judged(
    groups,
    judges,
    lambda kind, number: print(f'--{kind}: no room in its rows for {number} of its scores: 0'),
  )
  counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < size] + [size]
  total, result = len(questions), {}
  share = answers.wilson(greedy, total)
  print(f'greedy: {greedy} of {total} right {greedy / total:.1%} [{share[0]:.1%}, {share[1]:.1%}]')
  for how in verification.AGGREGATIONS:
    result[how] = verification.curves(pools, counts, how)
  any_right = sum(any(one.right for one in pool) for pool in pools)
  print(f'right answer among {size}: {any_right / total:.1%}')
  print('method'.ljust(24) + ''.join(f'N={n}'.rjust(8) for n in counts) + '   [95 %] at the last')
  for method in verification.METHODS:
    line = result['min'][method]
    low, high = answers.wilson(line[counts[-1]][0], total)
    shares = ''.join(f'{line[n][0] / total:.1%}'.rjust(8) for n in counts)
    print(f'{method.ljust(24)}{shares}   [{low:.1%}, {high:.1%}]')
  record = {
    'questions': total,
    'greedy': greedy,
    'any_right': any_right,
    'right_and_steps': result,
    # So that differences can be paired by question.
    'candidates': [[one._asdict() for one in pool] for pool in pools],
  }
  out.parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out, json.dumps(record) + '\n')
  print(f'wrote: {out}')


if __name__ == '__main__':
  cli.run_action(main, define_flags, ACTIONS)
