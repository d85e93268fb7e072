"""Pictures of paired differences against tokens: mean, band, crossover and verdict."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure, ticker

from moe_jax.analysis import difference_curves, paired
from moe_jax.runs import plots

COLOURS = {
  paired.CONFIRMED: '#2b8a3e',
  paired.CONTRADICTED: plots.ORANGE,
  paired.UNDECIDED: '0.45',
  difference_curves.NOT_YET: '#7048a8',
  'lower': '#2b8a3e',  # where there is no claim, but what is lower is better
  'higher': plots.ORANGE,
}


class Panel(NamedTuple):
  """One claim."""

  title: str
  curve: difference_curves.Curve
  verdict: str  # at the end; decides the colour


def draw(
  path: pathlib.Path,
  panels: Sequence[Panel],
  *,
  what: str = 'difference of training loss\n[nats per token]',
  columns: int = 3,
):
  """Draws a small picture per claim, all with the same axis of tokens.

  Args:
    path: PNG to write.
    panels: at least one.
    what: the differences and their unit.
    columns: pictures in a row, at most.
  """
  columns = min(columns, len(panels))
  rows = math.ceil(len(panels) / columns)
  width, height = (7.0, 4.2) if len(panels) == 1 else (1.2 + 3.3 * columns, 2.7 * rows)
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(width, height), layout='constrained')
    grid = fig.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, panel in zip(grid, panels):
      _panel(axes, panel)
    for axes in grid[len(panels) :]:
      axes.set_axis_off()
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
      axes.tick_params(labelbottom=True)
      axes.set_xlabel('tokens trained on')
    fig.supylabel(what, fontsize=10)
    plots.save(fig, path)


def _panel(axes: Any, panel: Panel):
  at, around = panel.curve.tokens, difference_curves.band(panel.curve)
  colour = COLOURS[panel.verdict]
  axes.axhline(0, color='0.3', lw=1)
  axes.plot(at, [one.mean for one in around], color=colour, lw=1.8)
  if around[0].num_seeds > 1:
    low, high = [one.low for one in around], [one.high for one in around]
    axes.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
  crossing = difference_curves.crossover(panel.curve)
  if crossing is not None:
    ends = [max(crossing.low, at[0]), min(crossing.high, at[-1])]
    axes.plot(ends, [0, 0], color='0.15', lw=3, solid_capstyle='butt')
    axes.plot([crossing.tokens], [0], 'o', color='0.15', ms=5)
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: _tokens(x)))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  _limit(axes, around)
  axes.set_title(panel.title, loc='left', fontsize=10)
  note = panel.verdict if crossing is None else f'{panel.verdict}\ncrosses at {crossing.text()}'
  axes.text(
    *(0.98, 0.97, note),
    **{'transform': axes.transAxes, 'ha': 'right', 'va': 'top', 'fontsize': 8, 'color': colour},
  )
  axes.grid(True)


def _tokens(count: float) -> str:
  """`30k`, `1M`: of a tick."""
  scale, unit = (1e9, 'G') if count >= 1e9 else (1e6, 'M') if count >= 1e6 else (1e3, 'k')
  return f'{count / scale:g}{unit}'


def _limit(axes: Any, around: Sequence[paired.Interval]):
  """Lets the scale be that of all but the first windows, in which the arms begin to learn."""
  rest = around[len(around) // 4 :]  # they hold 6 % of the tokens
  ends = [v for one in rest for v in (one.low, one.high, one.mean) if np.isfinite(v)]
  low, high = min(*ends, 0.0), max(*ends, 0.0)
  room = 0.15 * (high - low) or 0.1
  axes.set_ylim(low - room, high + 2.5 * room)
