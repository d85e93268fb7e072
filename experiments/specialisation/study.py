"""Tunes and measures every arm with every seed, and writes the table."""

import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.common import cli, local_jobs, package_functions, readme_tables, study_record
from moe_jax import atomic_files, errors
from moe_jax.analysis import paired
from moe_jax.analysis.purification import attacks
from moe_jax.api import load
from moe_jax.api import run as run_lib
from moe_jax.api import train as train_lib
from moe_jax.config import schema
from moe_jax.data import corpus, json_files
from moe_jax.interop import start_weights
from moe_jax.planning import compile_ahead
from moe_jax.post_training import answers, expert_scores, expert_selection
from moe_jax.runs import goodput, run_record, train_run
from moe_jax.training import evaluate, train_state, trainable

GENERAL = 'general_bits_per_byte'  # of the base's own held-out text
_WAY_OUT = 'give --beside a JSON file that this command wrote'
_ANSWER_TOKENS = {'lines': 8, 'packages': 12, 'sums': 64}
_LINES, _LONGEST = 2400, 48  # lines of code and prose, and the characters of one at most
_PER_PACKAGE, _HELDOUT = 110, 0.3  # functions of each package, and the share that is asked about


class Arm(NamedTuple):
  """What is tuned, and at which peak rate."""

  kind: str  # a key of schema.TRAINABLE
  rate: float
  scores: str = ''  # by which experts are chosen
  p: float = 0.0  # share of the scores that the chosen experts reach
  at_random: bool = False  # as many experts as by these scores, drawn


# The paper's rates are 3e-5 for all weights, 1e-4 for LoRA and 1e-5 for experts of a model of
# billions. These were swept on the lines of code and prose, see README.md.
ARMS = {
  'full': Arm('all', 5e-4),
  'lora': Arm('lora', 1e-3),
  'token': Arm('experts', 1e-2, 'token', 0.2),
  'gate': Arm('experts', 1e-2, 'gate', 0.1),
  'random': Arm('experts', 1e-2, 'token', 0.2, True),
}


def main(unused_argv: Sequence[str]):
  """Tunes, measures, writes."""
  values = flags.FLAGS
  workdir, base_dir = pathlib.Path(cli.required('workdir')), cli.required('base')
  seeds, arms = local_jobs.seeds(values.seeds), arms_of(values.arms)
  for name in ('tokens', 'n'):
    errors.require(values[name].value >= 1, f'--{name}={values[name].value} must be at least 1')
  readme_tables.check(pathlib.Path(values.out), *_comments())
  other = json_files.read_object(pathlib.Path(values.beside), _WAY_OUT) if values.beside else None
  base = load.load(base_dir, flag='--base')
  fixed = ('base', 'task', 'tokens', 'n')  # the last two are in no config of a run
  study_record.check(workdir, {name: values[name].value for name in fixed})
  if values.task != 'sums' and not local_jobs.is_shard():
    _write_examples(base, values.task, workdir / f'{values.task}.jsonl')
  scores = {seed: _scores(base, base_dir, workdir, seed) for seed in seeds}
  configs = {
    (name, seed): _config(base, base_dir, arm, seed, scores[seed])
    for seed in seeds
    for name, arm in arms.items()
  }
  for key, cfg in configs.items():  # results of other settings are not those that were asked for
    where = _result_path(workdir, *key).parent
    if (where / 'config.json').exists():
      run_record.check_workdir(where, cfg, allow_change=False, allow_longer=False)
  pending = [key for key in configs if not _result_path(workdir, *key).exists()]

  def tune(key: tuple[str, int]):
    _tune(configs[key], base, _result_path(workdir, *key))

  local_jobs.run('experiments.specialisation', pending, tune)
  if local_jobs.is_shard():
    return
  results = {
    f'{name}/{seed}': json.loads(_result_path(workdir, name, seed).read_text())
    for name, seed in configs
  }
  before = _before(base, next(iter(configs.values())), workdir)
  _write(arms, seeds, results, before, other)


def arms_of(words: Sequence[str]) -> dict[str, Arm]:
  """The arms that are asked for by their words: `full`, `lora:rate=4e-3`, `token:p=0.4`.

  Raises:
    errors.InputError: there is no such arm, it has no such setting, or the value is no number that
      it can take.
  """
  return {word: _arm(word) for word in words}


def _arm(word: str) -> Arm:
  name, *settings = word.split(':')
  errors.require(
    name in ARMS,
    f'--arms={word} must be among {", ".join(ARMS)}{errors.did_you_mean(name, ARMS)}',
  )
  arm = ARMS[name]
  names = ('rate', 'p') if arm.scores else ('rate',)
  for setting in settings:
    key, _, text = setting.partition('=')
    try:
      value = float(text)
    except ValueError:
      value = 0.0
    errors.require(
      key in names and value > 0 and (key != 'p' or value <= 1),
      f'--arms={word}: {setting!r} must be one of {", ".join(f"{n}=NUMBER" for n in names)}, '
      'a rate above 0, p in (0, 1]',
    )
    arm = arm._replace(**{key: value})
  return arm


def _scores(base: run_lib.Run, base_dir: str, workdir: pathlib.Path, seed: int) -> pathlib.Path:
  """The scores of a seed, in a file: of the base on the seed's own training rows."""
  path = workdir / 'scores' / str(seed) / 'summary.json'
  if not path.exists():
    page, changes = _task()
    cfg = train_lib.resolve(page, changes | {'init_from': base_dir, 'train.seed': seed})
    text = corpus.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed)
    found = expert_scores.score(base.trained, cfg, text, flags.FLAGS.tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    expert_selection.write_scores(path, found)
  return path


def _task() -> tuple[str, dict[str, Any]]:
  """The page of fine-tuning, and what the task changes of it."""
  task = flags.FLAGS.task
  if task == 'sums':
    return 'sft', {}
  changes = {
    'data.source': 'conversations',
    'data.path': str(pathlib.Path(flags.FLAGS.workdir) / f'{task}.jsonl'),
    'data.heldout_fraction': _HELDOUT,
  }
  return ('purify:tune' if task == 'lines' else 'sft'), changes


def _write_examples(base: run_lib.Run, task: str, path: pathlib.Path):
  """Writes the questions of a task that has no source of its own, with their answers."""
  if task == 'lines':
    pool = attacks.pool(base.config.data, _LONGEST)
    found = attacks.split(pool, 0, _LINES, 2, 2).attacker
    rows = [(one.text, one.label) for one in found]
  else:
    functions = package_functions.read(per_package=_PER_PACKAGE)
    names = package_functions.PACKAGES
    rows = [(package_functions.question(one), names[one.package]) for one in functions]
  lines = [json.dumps({'prompt': text, 'completion': label}) for text, label in rows]
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(path, '\n'.join(lines) + '\n')


def _config(
  base: run_lib.Run, base_dir: str, arm: Arm, seed: int, scores: pathlib.Path
) -> schema.Config:
  page, changes = _task()
  changes |= {
    'init_from': base_dir,
    'train.seed': seed,
    'train.num_steps': flags.FLAGS.steps,
    'train.eval_every': 0,
    'optim.peak_lr': arm.rate,
    'trainable.kind': arm.kind,
  }
  if arm.scores:
    number = base.config.model.moe.num_experts
    changes['trainable.experts'] = experts_of(arm, scores, number, seed)
  return train_lib.resolve(page, changes)


def experts_of(arm: Arm, scores: pathlib.Path, number: int, seed: int) -> list[list[int]]:
  """The experts that an arm tunes, by layer.

  Args:
    arm: one that chooses experts.
    scores: file of the scores.
    number: E, of whom random ones are drawn.
    seed: of the draw.
  """
  choice = expert_selection.select(*expert_selection.read_scores(scores, arm.scores), arm.p)
  chosen = list(choice.experts.values())
  if arm.at_random:
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(number, len(ids), replace=False).tolist() for ids in chosen]
  return chosen


def _result_path(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  return workdir / name / str(seed) / 'result.json'


def _tune(cfg: schema.Config, base: run_lib.Run, path: pathlib.Path):
  """Tunes and measures one run and writes its figures to `path`."""
  tuned, _ = train_run.run_training(
    cfg, path.parent, argv=sys.argv, say=lambda line: None, open_weights=start_weights.of
  )
  if tuned.interrupted_by:
    raise KeyboardInterrupt
  state = train_state.abstract_state(cfg, tuned.mesh)
  result = _measured(run_lib.Run(tuned, path.parent), cfg, base) | {
    'trained': trainable.count(cfg),
    'optimizer_bytes': compile_ahead.train_arguments(state)['optimizer_state'],
    'seconds': goodput.read(path.parent)['steps'],
  }
  atomic_files.write_text(path, json.dumps(result, indent=2) + '\n')
  print(f'{path.parent}: {result}', flush=True)
  jax.clear_caches()  # dozens of compiled models would fill the memory


def _measured(run: run_lib.Run, cfg: schema.Config, base: run_lib.Run) -> dict[str, Any]:
  """Right answers to the questions of `cfg`, and bits per byte of the base's own held-out text."""
  questions = answers.questions(cfg.data, flags.FLAGS.n)
  right = answers.measure(run, questions, cfg.data, _ANSWER_TOKENS[flags.FLAGS.task])
  general = evaluate.evaluate(base.config, run.variables, base.heldout_corpus(), base.mesh)
  return right.as_dict() | {GENERAL: general.bits_per_byte}


def _before(base: run_lib.Run, cfg: schema.Config, workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / 'before.json'
  if not path.exists():
    atomic_files.write_text(path, json.dumps(_measured(base, cfg, base), indent=2) + '\n')
  return json.loads(path.read_text())


def _write(
  arms: Mapping[str, Arm],
  seeds: Sequence[int],
  results: Mapping[str, Mapping[str, Any]],
  before: Mapping[str, Any],
  other: Mapping[str, Any] | None,
):
  values = flags.FLAGS
  names = ('base', 'task', 'steps', 'tokens', 'n')
  record = {
    'settings': {name: values[name].value for name in names}
    | {'arms': {name: arm._asdict() for name, arm in arms.items()}},
    'seeds': list(seeds),
    'before': dict(before),
    'runs': dict(results),
  }
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out / f'{values.table}.json', json.dumps(record, indent=2) + '\n')
  text = table(list(arms), seeds, results, before)
  if other is not None:
    text += '\n\n' + beside(list(arms), seeds, results, other)
  readme_tables.fill(out, *_comments(), text)
  print(text)


def _comments() -> tuple[str, str]:
  """What the table of this name stands between in README.md."""
  name = flags.FLAGS.table
  return f'<!-- {name}: written by the command -->', f'<!-- end of {name} -->'


def table(
  names: Sequence[str],
  seeds: Sequence[int],
  results: Mapping[str, Mapping[str, Any]],
  before: Mapping[str, Any],
) -> str:
  """A Markdown table: means over seeds, and differences to the first arm, seed by seed."""

  def of(name: str, key: str) -> list[float]:
    return [results[f'{name}/{seed}'][key] for seed in seeds]

  rows = [
    '| arm | right answers, % | against the first, points | general bits per byte lost | '
    'against the first | parameters trained | optimizer, MiB | seconds in steps |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for name in names:
    right = [100 * share for share in of(name, 'share')]
    lost = paired.interval([b - before[GENERAL] for b in of(name, GENERAL)])
    against = paired.difference(right, [100 * share for share in of(names[0], 'share')])
    lost_against = paired.difference(of(name, GENERAL), of(names[0], GENERAL))
    rows.append(
      f'| {name} | {statistics.fmean(right):.1f} | '
      f'{"" if name == names[0] else against.text(1)} | {lost.text(3)} | '
      f'{"" if name == names[0] else lost_against.text(3)} | '
      f'{statistics.fmean(of(name, "trained")):,.0f} | '
      f'{statistics.fmean(of(name, "optimizer_bytes")) / 2**20:.2f} | '
      f'{statistics.fmean(of(name, "seconds")):.0f} |'
    )
  share, general = 100 * before['share'], before[GENERAL]
  return '\n'.join(
    [*rows, '', f'Before: {share:.1f} % right, {general:.3f} bits per byte. Seeds: {len(seeds)}.']
  )


def beside(
  names: Sequence[str],
  seeds: Sequence[int],
  results: Mapping[str, Mapping[str, Any]],
  other: Mapping[str, Any],
) -> str:
  """A Markdown table: how much more an arm keeps up with the first one here than on another base.

  Args:
    names: arms, the first of which the others are measured against on their own base.
    seeds: of both, which pair them.
    results: by `ARM/SEED`, of this base.
    other: the record of the same command on the other base.

  Raises:
    errors.InputError: the other record has no such arm and seed.
  """
  needed = [f'{name}/{seed}' for name in names for seed in seeds]
  missing = [key for key in needed if key not in other['runs']]
  errors.require(
    not missing, f'--beside has no {", ".join(missing[:3])}; run it with the same arms and seeds'
  )

  def against_first(runs: Mapping[str, Mapping[str, Any]], name: str, key: str) -> list[float]:
    return [runs[f'{name}/{seed}'][key] - runs[f'{names[0]}/{seed}'][key] for seed in seeds]

  base = other['settings']['base']
  rows = [
    f'| arm | right answers against {names[0]} here, minus the same on {base}, points | '
    'general bits per byte lost, likewise |',
    '| --- | --- | --- |',
  ]
  for name in names[1:]:
    general = paired.difference(
      against_first(results, name, GENERAL), against_first(other['runs'], name, GENERAL)
    )
    points = paired.difference(
      [100 * value for value in against_first(results, name, 'share')],
      [100 * value for value in against_first(other['runs'], name, 'share')],
    )
    rows.append(f'| {name} | {points.text(1)} | {general.text(3)} |')
  return '\n'.join(rows)
