"""What the interactive page draws, as one JSON object."""

import math
from typing import Any

import numpy as np

from moe_jax.analysis import difference_curves, paired
from moe_jax.analysis.comparison import comparison as comparison_lib
from moe_jax.analysis.comparison import curves, verdicts

DIGITS = 6  # significant ones, of numbers that are drawn


def data(found: comparison_lib.Comparison) -> dict[str, Any]:
  """The comparison for `page.js`; infinities and NaN are null."""
  names = [one.name for one in found.groups]
  return {
    'baseline': found.baseline,
    'rule': difference_curves.RULE,
    'note': comparison_lib.COST_NOTE,
    'groups': [_group(found, one.name) for one in found.groups],
    'settings': [[key, *values] for key, values in found.settings.items()],
    'budgets': found.budget_rows(),
    'remarks': found.remarks(),
    'figures': {key: what for key, (what, _) in verdicts.FIGURES.items()},
    'against': {name: _against(found, name) for name in names} if len(names) > 1 else {},
  }


def _group(found: comparison_lib.Comparison, name: str) -> dict[str, Any]:
  group, series, routing = found.group(name), found.series[name], found.routing[name]
  held_out = {
    key: _interval(verdicts.interval(group, key))
    | {'seeds': _numbers(verdicts.held_out(group, key).values())}
    for key in verdicts.FIGURES
    if verdicts.interval(group, key) is not None
  }
  return {
    'name': name,
    'seeds': list(group.runs),
    'runs': [[str(run.path), seed, run.step] for seed, run in group.runs.items()],
    'held_out': held_out,
    'parameters': found.budgets[found.groups.index(group)],
    'curves': None if series is None else _series(curves.thinned(series)),
    'balance': None if routing is None else _balance(routing[0]),
    'load': None if routing is None else _load(routing[1]),
  }


def _series(series: curves.Series) -> dict[str, Any]:
  found: dict[str, Any] = {
    'seeds': series.seeds,
    'steps': _numbers(series.steps),
    'tokens': _numbers(series.tokens),
    'flops': _numbers(series.flops),
    'seconds': _numbers(series.seconds),
  }
  for key, values in series.values.items():
    if np.isfinite(values).any():
      found[key] = _band(values) | {'seeds': [_numbers(row) for row in values]}
  return found


def _band(values: np.ndarray) -> dict[str, list[float | None]]:
  """Mean and interval over the seeds of [seeds, points]; None where a seed has no value."""
  around = [paired.interval(column.tolist()) for column in values.T]
  return {key: _numbers(getattr(one, key) for one in around) for key in ('mean', 'low', 'high')}


def _balance(balance: curves.Balance) -> dict[str, Any]:
  layers = [balance.first_layer + i for i in range(len(balance.max_vio))]
  return {
    'steps': balance.steps,
    'layers': layers,
    'max_vio': [_numbers(row) for row in balance.max_vio],
  }


def _load(load: curves.Load) -> dict[str, Any]:
  return {
    'seed': load.seed,
    'steps': load.steps,
    'first_layer': load.first_layer,
    'relative': [[_numbers(row, 3) for row in one] for one in load.relative],
  }


def _against(found: comparison_lib.Comparison, baseline: str) -> dict[str, Any]:
  """Claims and curves of all other groups against one."""
  claims = found.claims(baseline)
  at_end = verdicts.at_end(claims)
  differences = {}
  for one in found.groups:
    if one.name == baseline:
      continue
    curve = found.curve(one.name, baseline)
    if curve is None:
      differences[one.name] = {'reasons': found.curve_reasons(one.name, baseline)}
    else:
      verdict = at_end.get(one.name) or found.curve_verdict(one.name, baseline)
      differences[one.name] = _difference(curve, verdict)
  return {
    'claims': [claim_data(claim) for claim in claims],
    'differences': differences,
  }


def claim_data(claim: verdicts.Claim) -> dict[str, Any]:
  """A claim in plain values."""
  found = {
    'arm': claim.arm,
    'baseline': claim.baseline,
    'figure': claim.figure,
    'verdict': claim.verdict,
    'plain': claim.plain,
    'holm': claim.holm,
    'p': _number(claim.p_value),
    'text': verdicts.sentence(claim),
    'pairs': len(claim.seeds),
  }
  return found | (_interval(claim.difference) if claim.difference is not None else {})


def _difference(curve: difference_curves.Curve, verdict: str) -> dict[str, Any]:
  crossing = difference_curves.crossover(curve)
  return {
    'tokens': _numbers(curve.tokens),
    **_band(curve.differences),
    'verdict': verdict,
    'text': difference_curves.sentence(curve, verdict),
    'crossover': None if crossing is None else _numbers(crossing[:3]),
  }


def _interval(found: paired.Interval | None) -> dict[str, float | None]:
  if found is None:
    return {}
  return {key: _number(getattr(found, key)) for key in ('mean', 'low', 'high')}


def _numbers(values: Any, digits: int = DIGITS) -> list[float | None]:
  return [_number(value, digits) for value in values]


def _number(value: float, digits: int = DIGITS) -> float | None:
  value = float(value)
  return float(f'{value:.{digits}g}') if math.isfinite(value) else None
