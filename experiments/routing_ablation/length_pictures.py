"""Claims against the length of training, a small picture each."""

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
      _panel(axes, claim, some)
    for axes in grid[len(shown) :]:
      axes.set_axis_off()
    fig.supylabel('difference at the end of training\n[held-out bits per byte]', fontsize=10)
    plots.save(fig, path)
  return html_report.Picture(
    path,
    'Difference at the end of whole runs against their tokens: mean over seeds and 95 % interval; '
    'green confirms the paper, orange contradicts it, grey is not distinguishable',
  )


def _panel(axes: Any, claim: arms.Claim, some: Sequence[Any]):
  axes.axhline(0, color='0.3', lw=1)
  at = [point.tokens for point in some]
  axes.plot(at, [point.graded.difference.mean for point in some], color='0.6', lw=1)
  for point in some:
    difference = point.graded.difference
    colour = difference_pictures.COLOURS[point.graded.plain]
    if difference.num_seeds > 1:
      axes.plot([point.tokens] * 2, [difference.low, difference.high], color=colour, lw=2.5)
    axes.plot([point.tokens], [difference.mean], 'o', color=colour, ms=6)
  axes.set_xscale('log')
  axes.set_xticks(at, [difference_curves.millions(tokens) for tokens in at])
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('tokens trained on')
  axes.set_title(f'{claim.arm} − {claim.baseline or "0"}', loc='left', fontsize=10)
  axes.grid(True)
