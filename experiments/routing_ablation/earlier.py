"""Runs of an earlier report, read from its tables: their workdirs may be elsewhere, or gone.

A report's `results.csv` and `runs.csv` hold what every later one needs of a run.
"""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.routing_ablation import arms, measure
from moe_jax import errors
from moe_jax.config import schema

# Columns of results.csv beside the figures of claims; 'seconds' and 'commit' are of newer reports.
KEPT = ('loss', 'train_drop_rate', 'step', 'seconds', 'commit')


def read(
  directory: pathlib.Path, configs: Mapping[str, schema.Config], seeds: Sequence[int]
) -> measure.Results:
  """The runs of a report that are asked for; empty for seeds that it has not.

  Args:
    directory: of results.csv and runs.csv.
    configs: the arms that are asked for.
    seeds: that are asked for.

  Raises:
    errors.InputError: there is no such report, its runs have another length, or it has a seed with
      some of the arms only: both sides of a pair are to come from one place.
  """
  curves = _curves(_rows(directory / 'runs.csv'))
  found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in configs}
  for row in _rows(directory / 'results.csv'):
    arm, seed = row['arm'], int(row['seed'])
    if arm in configs and seed in seeds:
      found[arm][seed] = _figures(row) | {'curve': curves[arm, seed]}
  known = sorted({seed for runs in found.values() for seed in runs})
  for name, cfg in configs.items():
    for seed in known:
      errors.require(
        seed in found[name],
        f'--earlier={directory} has seed {seed} of some arms, but not of {name}: pairs of runs are '
        'to come from one place; ask for other --seeds, or for the arms that it has',
      )
      steps = found[name][seed]['step']
      errors.require(
        steps == cfg.train.num_steps,
        f'--earlier={directory} has runs of {steps} steps, where {name} is to have '
        f'{cfg.train.num_steps}; give --steps={steps}',
      )
  return found


def joined(
  first: measure.Results, others: measure.Results, seeds: Sequence[int]
) -> measure.Results:
  """All runs of each arm in the order of the seeds."""
  return {
    name: {seed: (first[name] if seed in first[name] else others[name])[seed] for seed in seeds}
    for name in first
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
