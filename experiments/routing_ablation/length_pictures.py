"""Claims against the length of training: where they cross zero, and a small picture each."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import figure, ticker

from experiments.common import html_report
from experiments.routing_ablation import arms
from moe_jax.analysis import difference_curves, difference_pictures
from moe_jax.runs import plots

COLUMNS = 3


def over_lengths(some: Sequence[Any]) -> str:
  """The side of zero at each end of a claim's points, and where it changes, in words.

  For example: `Over whole runs: below zero after 1.25M tokens [0.307M, 3.07M]`.
  """
  crossing = crossing_of(some)
  if crossing is not None:
    side = 'below' if crossing.lower_after else 'above'
    return f'Over whole runs: {side} zero after {crossing.text()}'
  side = 'below' if some[-1].graded.difference.mean < 0 else 'above'
  return f'Over whole runs: the mean is {side} zero at every length'


def crossing_of(some: Sequence[Any]) -> difference_curves.Crossover | None:
  """Where the ends of whole runs change sign for the last time, over log(tokens); None = never."""
  tokens, around = [p.tokens for p in some], [p.graded.difference for p in some]
  return difference_curves.crossing(tokens, around, geometric=True)


def draw(out: pathlib.Path, found: Mapping[arms.Claim, Sequence[Any]]) -> list[html_report.Picture]:
  """Draws the claim that is known at most lengths, and all of them if there are others.

  Those about held-out bits per byte, or any if none is about them.

  Args:
    out: directory of lengths.png and claims.png.
    found: `lengths.points`.
  """
  shown = {claim: some for claim, some in found.items() if claim.figure == arms.BITS} or dict(found)
  main = max(shown, key=lambda claim: len(shown[claim]))
  pictures = [_draw(out / 'lengths.png', {main: shown[main]})]
  if len(shown) > 1:
    pictures.append(_draw(out / 'claims.png', shown))
  return pictures


def _draw(path: pathlib.Path, shown: Mapping[arms.Claim, Sequence[Any]]) -> html_report.Picture:
  columns = min(COLUMNS, len(shown))
  rows = math.ceil(len(shown) / columns)
  width, height = (6.4, 4.0) if len(shown) == 1 else (1.2 + 3.3 * columns, 2.7 * rows)
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(width, height), layout='constrained')
    grid = fig.subplots(rows, columns, squeeze=False).ravel()
    for axes, (claim, some) in zip(grid, shown.items()):
      title = f'{claim.arm} − {claim.baseline or "0"}'
      _panel(axes, f'{title}\n{_verdict(some)}' if len(shown) == 1 else title, some)
    for axes in grid[len(shown) :]:
      axes.set_axis_off()
    fig.supylabel('difference at the end of training\n[held-out bits per byte]', fontsize=10)
    plots.save(fig, path)
  return html_report.Picture(
    path,
    'Difference at the end of whole runs against their tokens: mean over seeds and 95 % interval; '
    'green confirms the paper, orange contradicts it, grey is not distinguishable; blue: where the '
    'mean crosses zero, between the lengths that bound it',
  )


def _verdict(some: Sequence[Any]) -> str:
  """Where the difference crosses zero, and what the longest runs say of the claim."""
  last = some[-1]
  end = f'after {difference_curves.millions(last.tokens)} tokens {last.graded.plain}'
  return f'{over_lengths(some).removeprefix("Over whole runs: ")}\n{end}'


def _panel(axes: Any, title: str, some: Sequence[Any]):
  axes.axhline(0, color='0.3', lw=1)
  if (crossing := crossing_of(some)) is not None:
    ends = max(crossing.low, some[0].tokens), min(crossing.high, some[-1].tokens)
    axes.axvspan(*ends, color='tab:blue', alpha=0.08, lw=0)
    axes.axvline(crossing.tokens, color='tab:blue', lw=1, ls='--')
  at = [point.tokens for point in some]
  axes.plot(at, [point.graded.difference.mean for point in some], color='0.6', lw=1)
  for point in some:
    difference = point.graded.difference
    colour = difference_pictures.COLOURS[point.graded.plain]
    if difference.num_seeds > 1:
      axes.plot([point.tokens] * 2, [difference.low, difference.high], color=colour, lw=2.5)
    axes.plot([point.tokens], [difference.mean], 'o', color=colour, ms=6)
  axes.set_xscale('log')
  axes.set_xticks(at, [difference_curves.millions(tokens) for tokens in at], fontsize=9)
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('tokens trained on')
  axes.set_title(title, loc='left', fontsize=10)
  axes.grid(True)
