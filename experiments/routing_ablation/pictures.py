"""The pictures of the report: verdicts, loss curves with bands, balance over time, sweeps."""

import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure

from experiments.common import html_report
from experiments.routing_ablation import arms, measure, over_tokens
from moe_jax.analysis import difference_pictures
from moe_jax.analysis.comparison import pictures as comparison_pictures
from moe_jax.runs import plots

COLOURS = difference_pictures.COLOURS
LADDER = ('dense', 'hash', 'switch', 'gshard', '1_15', '1_31', 'deepseekmoe', 'm4', 'dense_x16')
BALANCE = ('gshard', 'deepseekmoe', 'aux', 'loss_free')


def draw(
  out: pathlib.Path,
  results: measure.Results,
  graded: Sequence[Any],
  fits: Sequence[tuple[arms.Sweep, Any]],
) -> list[html_report.Picture]:
  """Draws what the trained arms allow.

  Args:
    out: directory of the pictures.
    results: of all runs.
    graded: `report.Graded` of the claims.
    fits: every sweep with its `report.slope`, None where it was not trained.
  """
  drawn = []
  with matplotlib.rc_context(plots.STYLE):
    if graded:
      drawn.append(_claims(out / 'claims.png', graded))
      drawn += over_tokens.draw(out, graded)
    drawn.append(_arms(out / 'arms.png', results))
    names = [n for n in LADDER if n in results and measure.curves(results, n, 'loss') is not None]
    if names:
      drawn.append(_curves(out / 'curves.png', results, names))
    names = [n for n in BALANCE if n in results and measure.curves(results, n, 'loss') is not None]
    if names:
      drawn.append(_balance(out / 'balance.png', results, names))
    for sweep, found in fits:
      if found is not None:
        drawn.append(_sweep(out / f'{sweep.name}.png', results, sweep, found))
  return drawn


def _claims(path: pathlib.Path, graded: Sequence[Any]) -> html_report.Picture:
  """Differences with intervals, in percent of the baseline, so that figures share an axis."""
  fig = figure.Figure(figsize=(9, 1.4 + 0.38 * len(graded)), layout='constrained')
  axes = fig.subplots()
  for y, one in enumerate(reversed(graded)):
    scale, found = 100 / one.base, one.difference
    colour = COLOURS[one.verdict]
    if found.num_seeds > 1:
      axes.plot([found.low * scale, found.high * scale], [y, y], color=colour, lw=2)
    axes.plot([found.mean * scale], [y], 'o', color=colour, ms=6)
    axes.annotate(
      one.verdict, (1.01, y), xycoords=('axes fraction', 'data'), va='center', color=colour
    )
  labels = [f'{_pair(g.claim)}{_short(g.claim)}' for g in reversed(graded)]
  axes.set_yticks(range(len(graded)), labels)
  axes.axvline(0, color='0.3', lw=1)
  axes.set_xscale('symlog', linthresh=5)
  ticks = [sign * size for size in (2, 5, 20, 100, 500) for sign in (-1, 1)]
  low, high = axes.get_xlim()
  shown = sorted([0, *(tick for tick in ticks if low <= tick <= high)])
  axes.set_xticks(shown, [f'{tick:+g}' if tick else '0' for tick in shown])
  axes.minorticks_off()
  axes.set_xlabel('difference, % of the baseline (linear within ±5); bar: 95 % interval over seeds')
  axes.grid(True, axis='x')
  plots.save(fig, path)
  return html_report.Picture(path, 'Every claim: paired difference over seeds, and its verdict')


def _arms(path: pathlib.Path, results: measure.Results) -> html_report.Picture:
  """Held-out bits per byte and MaxVio of every run, a dot per seed, the best arm on top."""
  columns = {name: measure.column(results, name, arms.BITS) for name in results}
  names = sorted(results, key=lambda name: -measure.rank(results, name))
  fig = figure.Figure(figsize=(9, 1.2 + 0.27 * len(names)), layout='constrained')
  left, right = fig.subplots(1, 2, sharey=True)
  for y, name in enumerate(names):
    left.plot(columns[name], [y] * len(columns[name]), 'o', color=plots.BLUE, ms=4)
    if (found := measure.column(results, name, arms.VIO)) is not None:
      right.plot(found, [y] * len(found), 'o', color=plots.ORANGE, ms=4)
  left.set_yticks(range(len(names)), names)
  left.set_xlabel('held-out bits per byte')
  right.set_xlabel('MaxVio over the held-out text (0 = balanced)')
  right.set_xlim(left=-0.1)
  for axes in (left, right):
    axes.grid(True, axis='both')
  plots.save(fig, path)
  return html_report.Picture(path, 'Every run: held-out bits per byte and balance, a dot per seed')


def _pair(claim: arms.Claim) -> str:
  return f'{claim.arm} − {claim.baseline}' if claim.baseline else claim.arm


def _short(claim: arms.Claim) -> str:
  """What is compared, where it is not the loss, and the paper's direction."""
  sign = {'lower': '< 0', 'higher': '> 0', 'equal': '= 0'}[claim.direction]
  what = {
    arms.BITS: '',
    arms.VIO: ', MaxVio',
    arms.DISABLED: ', best experts off',
    arms.FEWER: ', 4 of 7',
    arms.UNSHARED: ', shared off',
  }
  return f'{what[claim.figure]}  (paper: {sign})'


def _palette(names: Sequence[str]) -> dict[str, Any]:
  colours = matplotlib.colormaps['viridis_r'](np.linspace(0.12, 1, len(names)))
  return dict(zip(names, colours))


def _curves(
  path: pathlib.Path, results: measure.Results, names: Sequence[str]
) -> html_report.Picture:
  fig = figure.Figure(figsize=(9, 4.5), layout='constrained')
  left, right = fig.subplots(1, 2)
  base = 'gshard' if 'gshard' in names else names[0]
  for name, colour in _palette(names).items():
    steps, loss = measure.curves(results, name, 'loss')
    comparison_pictures.band(left, steps, loss, name, colour)
    if seeds := measure.common(results, name, base):
      both = (measure.curves(results, one, 'loss', seeds)[1] for one in (name, base))
      comparison_pictures.band(right, steps, operator.sub(*both), name, colour)
  left.set_title('training loss, nats per token')
  right.set_title(f'minus {base}, same seed and batch')
  for axes in (left, right):
    axes.set_xlabel('step')
    axes.grid(True)
  right.legend(frameon=False, fontsize=8, ncols=2)
  plots.save(fig, path)
  return html_report.Picture(
    path,
    'Training loss, mean over seeds and band of its 95 % interval. Batches differ between seeds: '
    'what tells arms apart is the difference to the same seed and batch, on the right',
  )


def _balance(
  path: pathlib.Path, results: measure.Results, names: Sequence[str]
) -> html_report.Picture:
  fig = figure.Figure(figsize=(9, 3.8), layout='constrained')
  left, right = fig.subplots(1, 2)
  for i, name in enumerate(names):
    for axes, key in ((left, 'max_vio'), (right, 'drop_rate')):
      found = measure.curves(results, name, key)
      if found is not None:
        comparison_pictures.band(axes, *found, name, f'C{i}')
  left.set_title('MaxVio of the batch, mean over layers')
  right.set_title('share of dropped assignments')
  left.set_ylim(bottom=0)
  right.set_ylim(bottom=-0.01)
  for axes in (left, right):
    axes.set_xlabel('step')
    axes.grid(True)
  left.legend(frameon=False)
  plots.save(fig, path)
  return html_report.Picture(path, 'Balance over training; 0 is perfect')


def _sweep(
  path: pathlib.Path, results: measure.Results, sweep: arms.Sweep, found: tuple[Any, np.ndarray]
) -> html_report.Picture:
  slope, parabola = found
  fig = figure.Figure(figsize=(6.5, 4.2), layout='constrained')
  axes = fig.subplots()
  points = {x: n for n, x in sweep.points.items() if n in results}
  seeds = measure.common(results, *points.values())  # those of the parabola
  for x, name in points.items():
    bits = measure.column(results, name, arms.BITS, seeds)
    axes.plot([x] * len(bits), bits, 'o', color=plots.BLUE, ms=4, alpha=0.6)
  fine = np.geomspace(min(points), max(points), 100)
  axes.plot(fine, np.polyval(parabola, np.log2(fine)), color=plots.ORANGE)
  axes.set_xscale('log', base=2)
  axes.set_xticks(list(points), [f'{x:g}' for x in points])
  axes.set_xlabel(sweep.axis)
  axes.set_ylabel('held-out bits per byte')
  axes.set_title(f'{slope.text(4)} per doubling', fontsize=10)
  axes.grid(True)
  plots.save(fig, path)
  return html_report.Picture(
    path, f'{sweep.title}: a dot per seed that all have, and a parabola through the means'
  )
