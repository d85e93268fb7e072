"""Runs of an earlier report, read from its tables: their workdirs may be elsewhere, or gone.

A report's `results.csv` and `runs.csv` hold what every later one needs of a run. A run is decided
by its config and seed; elsewhere, at another commit, it comes out the same but for rounding, which
training makes another draw of the same experiment. So runs of several places make one study.
"""

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.routing_ablation import arms, measure
from moe_jax import errors
from moe_jax.config import schema

# Columns of results.csv beside the figures of claims; those from `seconds` on are of newer reports.
KEPT = ('loss', 'train_drop_rate', 'step', 'seconds', 'commit', 'peak_lr')
KEPT += (*measure.GATES, measure.SAVED)


def read(
  directory: pathlib.Path, pages: Mapping[str, schema.Config], scale: str
) -> measure.Results:
  """All runs of a report.

  Args:
    directory: of results.csv and runs.csv; without the latter, as older reports are, the runs have
      no curves.
    pages: every arm as its page has it; older reports do not say their learning rates.
    scale: of these; older reports do not say theirs.

  Raises:
    errors.InputError: there is no such report, it is of another scale, or an arm of it is known no
      more.
  """
  path = directory / 'runs.csv'
  curves = _curves(_rows(path)) if path.exists() else {}
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for row in _rows(directory / 'results.csv'):
    arm, seed = row['arm'], int(row['seed'])
    other = row.get('scale') or scale
    errors.require(
      other == scale,
      f'--earlier={directory} has runs at --scale={other}, where --scale={scale} is asked for; '
      'name a report of this scale',
    )
    errors.require(
      arm in pages,
      f'--earlier={directory}: {arm!r} in results.csv is none of the arms {", ".join(pages)}; '
      'take its lines out of results.csv and runs.csv',
    )
    figures = _figures(row) | {'curve': curves.get((arm, seed))}
    figures['peak_lr'] = figures['peak_lr'] or pages[arm].optim.peak_lr
    found.setdefault(arm, {})[seed] = figures
  return found


def speeds(directory: pathlib.Path) -> dict[str, float]:
  """Training tokens per second by arm, as the report has them; {} of one that has none."""
  rates = {row['arm']: row.get('tokens_per_second') for row in _rows(directory / 'results.csv')}
  return {name: float(rate) for name, rate in rates.items() if rate}


def check(directory: pathlib.Path, runs: measure.Results, configs: Mapping[str, schema.Config]):
  """Refuses runs that were trained otherwise than these configs say.

  Args:
    directory: of the report, for the message.
    runs: of the report.
    configs: by arm.

  Raises:
    errors.InputError: they have another length, or another learning rate.
  """
  for name, cfg in configs.items():
    for run in runs.get(name, {}).values():
      errors.require(
        run['step'] == cfg.train.num_steps,
        f'--earlier={directory} has runs of {run["step"]} steps, where {name} is to have '
        f'{cfg.train.num_steps}; give --steps={run["step"]}',
      )
      errors.require(
        _is_at(run, cfg),
        f'--earlier={directory} has runs of {name} at a peak rate of {run["peak_lr"]:g}, where it '
        f'is to have {cfg.optim.peak_lr:g}; give its --learning_rates, if it had any',
      )


def at_rate(
  runs: Mapping[int, Mapping[str, Any]], cfg: schema.Config
) -> dict[int, Mapping[str, Any]]:
  """Those of an arm's runs that were trained at the peak rate of `cfg`."""
  return {seed: run for seed, run in runs.items() if _is_at(run, cfg)}


def _is_at(run: Mapping[str, Any], cfg: schema.Config) -> bool:
  return math.isclose(run['peak_lr'], cfg.optim.peak_lr, rel_tol=1e-6)


def joined(
  first: measure.Results, others: measure.Results
) -> dict[str, dict[int, Mapping[str, Any]]]:
  """All runs of each arm of either, arms as `arms.ARMS` has them, seeds rising."""
  return {
    name: dict(sorted({**others.get(name, {}), **first.get(name, {})}.items()))
    for name in arms.ARMS
    if name in first or name in others
  }


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
  errors.require(
    path.is_file(),
    f'--earlier={path.parent} must be the directory of a report of this command; {path.name} is '
    'missing there',
  )
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def _figures(row: Mapping[str, str]) -> dict[str, Any]:
  figures = {key: _number(row.get(key, '')) for key in (*arms.FIGURES, *KEPT)}
  # A figure that an arm has not is not there, as in the workdirs.
  figures = {k: v for k, v in figures.items() if v is not None or k in KEPT}
  return figures | {'step': int(row['step']), 'commit': row.get('commit') or 'unknown'}


def _number(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def _curves(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, int], dict[str, list[Any]]]:
  """By arm and seed; dropped assignments are not kept."""
  found: dict[tuple[str, int], dict[str, list[Any]]] = {}
  for row in rows:
    curve = found.setdefault((row['arm'], int(row['seed'])), {})
    curve.setdefault('step', []).append(int(row['step']))
    for key in ('loss', 'max_vio', 'drop_rate'):
      curve.setdefault(key, []).append(_number(row.get(key, '')))
  return found
