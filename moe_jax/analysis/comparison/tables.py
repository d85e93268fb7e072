"""The comparison as CSV: curves, held-out figures, differences against tokens, verdicts."""

import csv
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax import atomic_files
from moe_jax.analysis import difference_curves
from moe_jax.analysis.comparison import comparison as comparison_lib
from moe_jax.analysis.comparison import curves, verdicts


def write(found: comparison_lib.Comparison, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes four files; returns their paths."""
  written = []
  for name, rows in (
    ('curves.csv', _curves(found)),
    ('held_out.csv', _held_out(found)),
    ('differences.csv', _differences(found)),
    ('verdicts.csv', _verdicts(found)),
  ):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([_cell(v) for v in row] for row in rows)
    atomic_files.write_text(out / name, text.getvalue())
    written.append(out / name)
  return written


def _cell(value: Any) -> Any:
  if value is None or isinstance(value, float) and not np.isfinite(value):
    return ''
  return f'{value:.8g}' if isinstance(value, float) else value


Rows = Iterable[Sequence[Any]]


def _curves(found: comparison_lib.Comparison) -> Rows:
  """A line per group, seed and logged step."""
  yield ['arm', 'seed', 'step', 'tokens', 'flops', 'seconds', *curves.KEYS]
  for name, series in found.series.items():
    if series is None:
      continue
    columns = [c.tolist() for c in (series.steps, series.tokens, series.flops, series.seconds)]
    for i, seed in enumerate(series.seeds):
      values = [series.values[key][i].tolist() for key in curves.KEYS]
      for row in zip(*columns, *values):
        yield [name, seed, *row]


def _held_out(found: comparison_lib.Comparison) -> Rows:
  """A line per run."""
  yield ['arm', 'seed', 'steps', 'directory', *verdicts.FIGURES]
  for group in found.groups:
    for seed, run in group.runs.items():
      values = [run.held_out.get(key) for key in verdicts.FIGURES]
      yield [group.name, seed, run.step, str(run.path), *values]


def _differences(found: comparison_lib.Comparison) -> Rows:
  """A line per group and window of steps: the training loss against the baseline's."""
  yield ['arm', 'baseline', 'tokens', 'mean', 'low', 'high']
  for group in found.groups:
    curve = found.curve(group.name) if group.name != found.baseline else None
    if curve is not None:
      for tokens, one in zip(curve.tokens.tolist(), difference_curves.band(curve)):
        yield [group.name, found.baseline, tokens, one.mean, one.low, one.high]


def _verdicts(found: comparison_lib.Comparison) -> Rows:
  """A line per claim."""
  yield ['arm', 'baseline', 'figure', 'pairs', 'mean', 'low', 'high', 'verdict', 'holm', 'why']
  for claim in found.claims():
    one = claim.difference
    ends = [None] * 3 if one is None else [one.mean, one.low, one.high]
    yield [
      *(claim.arm, claim.baseline, claim.figure, len(claim.seeds), *ends),
      *(claim.verdict, claim.holm, '; '.join(claim.reasons)),
    ]
