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

from experiments.common import cli, local_jobs, readme_tables
from moe_jax import atomic_files, errors
from moe_jax.analysis import paired
from moe_jax.api import load
from moe_jax.api import run as run_lib
from moe_jax.api import train as train_lib
from moe_jax.config import schema
from moe_jax.interop import start_weights
from moe_jax.planning import compile_ahead
from moe_jax.post_training import answers, expert_config, expert_scores, expert_selection
from moe_jax.runs import goodput, run_record, train_run
from moe_jax.training import evaluate, train_state, trainable

GENERAL = 'general_bits_per_byte'  # of the base's own held-out text
START, END = '<!-- table: written by the command -->', '<!-- end of table -->'


class Arm(NamedTuple):
  """What is tuned, and at which peak rate."""

  kind: str  # a key of schema.TRAINABLE
  rate: float
  scores: str = ''  # by which experts are chosen


# The paper's rates are 3e-5 for all weights, 1e-4 for LoRA and 1e-5 for experts; the page's rate
# for all weights of a model of some million parameters stands here for all three until it is swept.
ARMS = {
  'full': Arm('all', 2e-3),
  'lora': Arm('lora', 2e-3),
  'token': Arm('experts', 2e-3, 'token'),
  'gate': Arm('experts', 2e-3, 'gate'),
  'random': Arm('experts', 2e-3, 'token'),
}


def main(unused_argv: Sequence[str]):
  """Tunes, measures, writes."""
  values = flags.FLAGS
  workdir, base_dir = pathlib.Path(cli.required('workdir')), cli.required('base')
  seeds, arms = local_jobs.seeds(values.seeds), _arms(values.arms, values.rates)
  base = load.load(base_dir, flag='--base')
  choices = {seed: _choices(base, base_dir, workdir, seed) for seed in seeds}
  configs = {
    (name, seed): _config(base, base_dir, name, arm, seed, choices[seed])
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
  _write(pathlib.Path(values.out), arms, seeds, results, before)


def _arms(names: Sequence[str], rates: Sequence[str]) -> dict[str, Arm]:
  """The arms that are asked for, at the rates that are given.

  Raises:
    errors.InputError: there is no such arm, or a rate is no number.
  """
  for name in names:
    errors.require(
      name in ARMS,
      f'--arms={name} must be among {", ".join(ARMS)}{errors.did_you_mean(name, ARMS)}',
    )
  found = {name: ARMS[name] for name in names}
  for text in rates:
    name, _, rate = text.partition('=')
    try:
      found[name] = found[name]._replace(rate=float(rate))
    except (KeyError, ValueError) as e:
      raise errors.InputError(
        f'--rates={text} must be ARM=RATE with an arm of --arms={",".join(names)}'
      ) from e
  return found


def _choices(
  base: run_lib.Run, base_dir: str, workdir: pathlib.Path, seed: int
) -> dict[str, expert_config.ExpertConfig]:
  """The experts of a seed by kind of score, of the base on the seed's own training rows."""
  path = workdir / 'scores' / str(seed) / 'summary.json'
  if not path.exists():
    cfg = train_lib.resolve('sft', {'init_from': base_dir, 'train.seed': seed})
    found = expert_scores.score(base.trained, cfg, flags.FLAGS.tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    expert_selection.write_scores(path, found)
  return {
    kind: expert_selection.select(
      *expert_selection.read_scores(path, kind), expert_selection.PAPERS_SHARE[kind]
    )
    for kind in expert_selection.KINDS
  }


def _config(
  base: run_lib.Run,
  base_dir: str,
  name: str,
  arm: Arm,
  seed: int,
  choices: Mapping[str, expert_config.ExpertConfig],
) -> schema.Config:
  changes: dict[str, Any] = {
    'init_from': base_dir,
    'train.seed': seed,
    'train.num_steps': flags.FLAGS.steps,
    'train.eval_every': 0,
    'optim.peak_lr': arm.rate,
    'trainable.kind': arm.kind,
  }
  if arm.scores:
    chosen = list(choices[arm.scores].experts.values())
    if name == 'random':
      rng, number = np.random.default_rng(seed), base.config.model.moe.num_experts
      chosen = [rng.choice(number, len(ids), replace=False).tolist() for ids in chosen]
    changes['trainable.experts'] = chosen
  return train_lib.resolve('sft', changes)


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
  right = answers.measure(run, questions, cfg.data, 64)
  general = evaluate.evaluate(base.config, run.variables, base.heldout_corpus(), base.mesh)
  return right.as_dict() | {GENERAL: general.bits_per_byte}


def _before(base: run_lib.Run, cfg: schema.Config, workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / 'before.json'
  if not path.exists():
    atomic_files.write_text(path, json.dumps(_measured(base, cfg, base), indent=2) + '\n')
  return json.loads(path.read_text())


def _write(
  out: pathlib.Path,
  arms: Mapping[str, Arm],
  seeds: Sequence[int],
  results: Mapping[str, Mapping[str, Any]],
  before: Mapping[str, Any],
):
  settings = {name: flags.FLAGS[name].value for name in ('base', 'steps', 'tokens', 'n')}
  record = {
    'settings': settings | {'arms': {name: arm._asdict() for name, arm in arms.items()}},
    'seeds': list(seeds),
    'before': dict(before),
    'runs': dict(results),
  }
  out.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out / 'results.json', json.dumps(record, indent=2) + '\n')
  text = table(list(arms), seeds, results, before)
  readme_tables.fill(out, START, END, text)
  print(text)


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
