"""Any two arms of a report against each other, whether a claim compares them or not."""

import csv
import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, figure

from experiments.common import html_report
from experiments.routing_ablation import arms, measure
from moe_jax.analysis import paired
from moe_jax.runs import plots

FILE = 'pairs.csv'
THOUSANDTHS = 1000


class Pair(NamedTuple):
  """Held-out bits per byte of `arm` minus those of `baseline`, paired by seed."""

  arm: str
  baseline: str
  difference: paired.Interval
  holm: float  # p value, corrected for the number of pairs


def pairs(results: measure.Results) -> list[Pair]:
  """All pairs of arms with two common seeds or more, the better arm first, best arms first.

  Without arms that have a seed whose figure is not finite: nothing is so much better.
  """
  ranked = sorted(results, key=lambda name: measure.rank(results, name))
  ranked = [name for name in ranked if np.isfinite(measure.rank(results, name))]
  found, p_values = [], []
  for one, other in itertools.combinations(ranked, 2):
    both = measure.against(results, one, other, arms.BITS)
    if both is None or len(both[0]) < 2:
      continue
    found.append(Pair(one, other, paired.difference(*both), 1.0))
    p_values.append(paired.p_value([a - b for a, b in zip(*both)], 'lower'))
  return [pair._replace(holm=p) for pair, p in zip(found, paired.holm(p_values))]


def csv_text(found: Sequence[Pair]) -> str:
  """A line per pair."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['arm', 'baseline', 'seeds', 'mean', 'low', 'high', 'p by Holm'])
  for pair in found:
    one = pair.difference
    ends = [f'{v:.5f}' for v in (one.mean, one.low, one.high)]
    writer.writerow([pair.arm, pair.baseline, one.num_seeds, *ends, f'{pair.holm:.3g}'])
  return text.getvalue()


def draw(path: pathlib.Path, found: Sequence[Pair]) -> html_report.Picture:
  """Draws a square per pair: how far the row's arm is behind the column's.

  Args:
    path: of the picture.
    found: at least one pair.
  """
  names = list(dict.fromkeys(name for pair in found for name in (pair.arm, pair.baseline)))
  behind = np.full((len(names), len(names)), np.nan)
  side = 1.8 + 0.32 * len(names)
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(side + 1, side), layout='constrained')
    axes = fig.subplots()
    for pair in found:
      row, column = names.index(pair.baseline), names.index(pair.arm)
      one = pair.difference
      behind[row, column] = size = round(-one.mean * THOUSANDTHS) + 0.0  # and no -0
      words = {'ha': 'center', 'va': 'center', 'fontsize': 6.5}
      if one.covers_zero:
        axes.text(column, row, f'{size:.0f}', color='0.45', **words)
      else:
        axes.text(column, row, f'{size:.0f}', color='black', weight='bold', **words)
    # The better arm of all its seeds may be behind over those that both have.
    top = max(1.0, 2 * float(np.nanmax(behind)))
    axes.imshow(behind, cmap='Oranges', norm=colors.PowerNorm(0.5, 0, top))
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title('row minus column, thousandths of a bit per byte', fontsize=10)
    axes.grid(False)
    plots.save(fig, path)
  return html_report.Picture(
    path,
    'Any two arms: how much more bits per byte the row has than the column, in thousandths, over '
    'the seeds of both; bold where the 95 % interval leaves out zero (each pair on its own), grey '
    'where not',
  )
