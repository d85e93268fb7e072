"""Trains and measures what is missing of every seed, then writes the report."""

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments.common import cli, local_jobs, readme_tables, study_record
from experiments.reinforcement import arms as arms_lib
from experiments.reinforcement import report
from moe_jax import atomic_files, errors
from moe_jax.api import train as train_lib
from moe_jax.config import pages, parse, schema
from moe_jax.data.tasks import arithmetic
from moe_jax.interop import start_weights
from moe_jax.post_training import (
  answers,
  candidates,
  process_stage,
  solutions,
  stages,
  step_labels,
  verification,
)
from moe_jax.runs import goodput, metric_log, run_record, train_run, trained_run

PRM, ORM = 'process_reward:small', 'process_reward:small_outcome'
COUNTS = (1, 2, 4, 8, 16, 32, 64)
# Settings that results depend on: of bases, of arms beside these, and of the verification.
BASE = ('base_steps', 'n', 'samples')
LEARNING = (*BASE, 'iterations')
LABELS = ('base_steps', 'label_questions', 'solutions', 'completions', 'judge_steps')
VERIFICATION = (*LABELS, 'n', 'candidates')
DRAWN = 7  # of the draws of a seed's measurements, away from those of its training


def main(unused_argv: Sequence[str]):
  """Runs what is missing, then writes the report."""
  values, workdir = flags.FLAGS, pathlib.Path(cli.required('workdir'))
  seeds, arms = local_jobs.seeds(values.seeds), arms_lib.chosen(values.arms, values.rates)
  out = pathlib.Path(values.out)
  readme_tables.check(out, report.START, report.END)
  for part in values.parts:
    errors.require(
      part in arms_lib.PARTS, f'--parts={part} must be among {", ".join(arms_lib.PARTS)}'
    )
  for name in ('iterations', 'n', 'samples', 'label_questions', 'solutions', 'completions'):
    given = getattr(values, name)
    errors.require(given > 0, f'--{name}={given} must be positive')
  errors.require(
    values.candidates in COUNTS,
    f'--candidates={values.candidates} must be among {", ".join(map(str, COUNTS))}',
  )
  learning = arms if 'learning' in values.parts else {}
  verify = 'verification' in values.parts
  found = [Seed(workdir, seed) for seed in seeds]
  for seed in found:
    seed.check(learning, verify)
  pending = [seed for seed in found if not seed.is_done(learning, verify)]
  local_jobs.run('experiments.reinforcement', pending, lambda seed: seed.fill(learning, verify))
  if not local_jobs.is_shard():
    records = {seed.number: seed.record(learning, verify) for seed in found}
    report.write(out, learning, records, _settings())


def _settings() -> dict[str, Any]:
  names = ('iterations', 'base_steps', 'n', 'samples', 'rates')
  more = ('label_questions', 'solutions', 'completions', 'judge_steps', 'candidates')
  return {name: flags.FLAGS[name].value for name in (*names, *more)}


class Seed:
  """Everything of one seed: bases, arms, labels and judges, each made when it is asked for."""

  def __init__(self, workdir: pathlib.Path, number: int):
    self.number, self._place = number, workdir / str(number)

  def _result(self, name: str) -> pathlib.Path:
    return self._place / name / 'result.json'

  def is_done(self, arms: Mapping[str, arms_lib.Arm], verify: bool) -> bool:
    """Whether nothing of what is asked for is missing."""
    wanted = [*arms, *self._bases(arms)] + (['verification'] if verify else [])
    return all(self._result(name).exists() for name in wanted)

  def _bases(self, arms: Mapping[str, arms_lib.Arm]) -> list[str]:
    return list(dict.fromkeys(['base', *(arm.base for arm in arms.values())]))

  def check(self, arms: Mapping[str, arms_lib.Arm], verify: bool):
    """Requires that all can be run, and what is there is of these settings, before anything runs.

    Raises:
      errors.InputError: it is not.
    """
    bases = {name: self._base_config(name) for name in self._bases(arms)}
    self._check_what_follows(bases, arms, verify)
    for name in [*bases, *arms]:
      where = self._place / name
      start = name if name in bases else arms[name].base
      if (where / 'config.json').exists() and (self._place / start / 'config.json').exists():
        cfg = bases[name] if name in bases else self._arm_config(arms[name], self._place)
        run_record.check_workdir(where, cfg, allow_change=False, allow_longer=False)
    for path in self._place.glob('*/result.json'):
      self._kept(path)

  def _check_what_follows(
    self, bases: Mapping[str, schema.Config], arms: Mapping[str, arms_lib.Arm], verify: bool
  ):
    """Resolves what starts from bases, as if these were there."""
    with tempfile.TemporaryDirectory() as directory:
      for name, cfg in bases.items():
        (pathlib.Path(directory) / name).mkdir()
        record = json.dumps({'config': parse.to_dict(cfg)})
        (pathlib.Path(directory) / name / 'config.json').write_text(record)
      for arm in arms.values():
        self._arm_config(arm, pathlib.Path(directory))
      judges = (PRM, ORM) if verify else (PRM,) if any(a.judged for a in arms.values()) else ()
      for page in judges:
        self._judge_config(page, pathlib.Path(directory))

  def _kept(self, path: pathlib.Path) -> dict[str, Any]:
    """A result that was measured before, of the same settings."""
    found = json.loads(path.read_text(encoding='utf-8'))
    name = path.parent.name
    keys = BASE if name in arms_lib.BASES else LEARNING
    keys = VERIFICATION if name == 'verification' else keys
    settings = _settings()
    study_record.require_same(path, found['settings'], {key: settings[key] for key in keys})
    return found

  def fill(self, arms: Mapping[str, arms_lib.Arm], verify: bool):
    """Trains and measures what is missing."""
    for name in self._bases(arms):
      if not self._result(name).exists():
        self._learn(name, self._base_config(name))
    if verify and not self._result('verification').exists():
      self._verify()
    for name, arm in arms.items():
      if self._result(name).exists():
        continue
      if arm.judged:
        self._judge('prm', PRM)
      self._learn(name, self._arm_config(arm, self._place))

  def record(self, arms: Mapping[str, arms_lib.Arm], verify: bool) -> dict[str, Any]:
    """What was measured."""
    names = [*self._bases(arms), *arms] + (['verification'] if verify else [])
    return {name: self._kept(self._result(name)) for name in names}

  def _base_config(self, name: str) -> schema.Config:
    changes: dict[str, Any] = {'train.seed': self.number}
    if steps := flags.FLAGS.base_steps:
      changes |= {'train.num_steps': steps, 'checkpoint.save_every': steps, 'train.eval_every': 0}
    return train_lib.resolve(arms_lib.BASES[name], changes)

  def _arm_config(self, arm: arms_lib.Arm, place: pathlib.Path) -> schema.Config:
    """Of an arm that starts from a base in a directory."""
    updates = pages.values(arm.page).objective.policy.updates
    changes = {
      'init_from': str(place / arm.base),
      'train.seed': self.number,
      **arms_lib.changes(arm, flags.FLAGS.iterations, updates),
    }
    if arm.judged:
      changes['objective.policy.reward_model'] = str(self._place / 'prm')
    return train_lib.resolve(arm.page, changes)

  def _trained(self, name: str, cfg: schema.Config) -> trained_run.Run:
    """A run of the ordinary path, trained or gone on with."""
    run, _ = train_run.run_training(
      cfg,
      self._place / name,
      argv=sys.argv,
      say=lambda line: None,
      open_weights=start_weights.of,
      stage=stages.of(cfg),
    )
    if run.interrupted_by:
      raise KeyboardInterrupt
    return run

  def _learn(self, name: str, cfg: schema.Config):
    """Trains a base or an arm and writes what it answers."""
    run = self._trained(name, cfg)
    place = self._place / name
    self._write(name, _measured(run, self.number) | _of_training(place, cfg))

  def _write(self, name: str, result: Mapping[str, Any]):
    path = self._result(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, json.dumps({'settings': _settings(), **result}) + '\n')
    print(f'{path.parent}: {result}', flush=True)
    jax.clear_caches()  # dozens of compiled models would fill the memory

  def _judge(self, name: str, page: str) -> trained_run.Run:
    labels = self._place / 'labels.jsonl'
    if not labels.exists():
      self._label(labels)
    return self._trained(name, self._judge_config(page, self._place))

  def _judge_config(self, page: str, place: pathlib.Path) -> schema.Config:
    """Of a judge that starts from the base in a directory."""
    changes: dict[str, Any] = {
      'init_from': str(place / 'base'),
      'train.seed': self.number,
      'objective.process_reward.labels': str(self._place / 'labels.jsonl'),
    }
    if steps := flags.FLAGS.judge_steps:
      changes |= {'train.num_steps': steps, 'checkpoint.save_every': steps}
    return train_lib.resolve(page, changes)

  def _writer(self) -> tuple[solutions.Writer, schema.DataConfig]:
    run = trained_run.load(self._place / 'base')
    return solutions.Writer(run, run.cfg.data, max_new_tokens=_limit(), seed=self.number), (
      run.cfg.data
    )

  def _label(self, path: pathlib.Path):
    """Labels steps of solutions to training questions by completing them."""
    values, (writer, data) = flags.FLAGS, self._writer()
    questions = answers.questions(data, values.label_questions, heldout=False)
    found = solutions.distinct(writer.sample(questions, values.solutions))
    step_labels.write(path, writer.label(found, values.completions))

  def _verify(self):
    """Answers held-out questions with the base, and chooses among the answers."""
    values, began = flags.FLAGS, time.perf_counter()
    judges = {'prm': self._judge('prm', PRM), 'orm': self._judge('orm', ORM)}
    writer, data = self._writer()
    questions = answers.questions(data, values.n)
    groups = writer.sample(questions, values.candidates)
    greedy = sum(one[0].right for one in writer.sample(questions, 1, greedy=True))
    pools = candidates.judged(groups, judges)
    counts = [n for n in COUNTS if n <= values.candidates]
    result = {
      'questions': len(questions),
      'greedy': greedy,
      'any_right': sum(any(one.right for one in pool) for pool in pools),
      'right_and_steps': {
        how: verification.curves(pools, counts, how) for how in verification.AGGREGATIONS
      },
      'labels': _label_quality(step_labels.read(self._place / 'labels.jsonl', 'labels')),
      'judges': {kind: self._quality(kind) for kind in judges},
      'seconds': time.perf_counter() - began,
    }
    self._write('verification', result)

  def _quality(self, kind: str) -> dict[str, Any]:
    found = json.loads((self._place / kind / process_stage.RESULT_FILE).read_text('utf-8'))
    return {key: None if value != value else value for key, value in found.items()}  # no NaN


def _limit() -> int:
  """Tokens of an answer, as the arms have it."""
  return pages.values('grpo').objective.policy.max_new_tokens


def _measured(run: trained_run.Run, seed: int) -> dict[str, Any]:
  """Shares of held-out questions answered rightly, greedily and drawn, and of right steps."""
  values, data = flags.FLAGS, run.cfg.data
  questions = answers.questions(data, values.n)
  writer = solutions.Writer(run, data, max_new_tokens=_limit(), seed=DRAWN * 10**6 + seed)
  drawn = [one for group in writer.sample(questions, values.samples) for one in group]
  greedy = [one for group in writer.sample(questions, 1, greedy=True) for one in group]
  steps = [arithmetic.num_right_steps(one.text, one.question.prompt[-1].content) for one in drawn]
  return {
    'questions': len(questions),
    'greedy': statistics.fmean(one.right for one in greedy),
    'drawn': statistics.fmean(one.right for one in drawn),
    'right_steps': sum(right for right, _ in steps) / max(sum(all_ for _, all_ in steps), 1),
    'steps': sum(all_ for _, all_ in steps) / len(drawn),
    'tokens': statistics.fmean(len(one.tokens) for one in drawn),
  }


def _of_training(place: pathlib.Path, cfg: schema.Config) -> dict[str, Any]:
  """What the training itself has logged."""
  spent = goodput.read(place)
  found: dict[str, Any] = {'seconds': sum(spent.values())}
  if cfg.objective.kind != 'policy':
    return found
  policy, logged = cfg.objective.policy, metric_log.read_metrics(place)
  lines = [line for line in logged if line.get('right_share') is not None][:: policy.updates]
  differ = [line['experts_differ'] for line in lines if line['experts_differ'] is not None]
  return found | {
    'answers': len(lines) * policy.prompts * policy.group_size,
    'rate': cfg.optim.peak_lr,
    'rollout_seconds': sum(line['rollout_seconds'] for line in lines),
    'reward': [line['reward'] for line in lines],
    'experts_differ': max(differ) if differ else None,
  }


def _label_quality(found: list[step_labels.Labelled]) -> dict[str, Any]:
  """Of labels before the last step against the truth, by the number of completions."""
  pairs = [(o, t) for one in found for o, t in zip(one.outcomes[:-1], one.truth or ())]
  counts = [n for n in COUNTS if n <= flags.FLAGS.completions]
  quality = verification.label_quality([o for o, _ in pairs], [t for _, t in pairs], counts)
  return {
    'solutions': len(found),
    'right': sum(one.right for one in found),
    'by_completions': {str(n): one.as_dict() for n, one in quality.items()},
  }
