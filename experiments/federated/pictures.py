"""The pictures of the comparison: differences by setting, curves."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure

from moe_jax.analysis import paired
from moe_jax.runs import plots

GROUPS = ('balanced', 'tail')
COLOURS = ('#1b9e77', '#66a61e', '#e6ab02', '#d95f02', '#7570b3', '#e7298a')


def draw(out: pathlib.Path, results: Mapping[Any, Any]):
  """Writes comparison.png and curves.png.

  Args:
    out: where to.
    results: `comparison.Results`.
  """
  with matplotlib.rc_context(plots.STYLE):
    _curves(out / 'curves.png', results)
    if any(name == 'redgrape' for name, _ in results) and len({name for name, _ in results}) > 1:
      _comparison(out / 'comparison.png', results)


def _comparison(path: pathlib.Path, results: Mapping[Any, Any]):
  """RedGrape minus each other method with intervals over seeds, setting by setting."""
  names = [name for name in dict.fromkeys(name for name, _ in results) if name != 'redgrape']
  settings = list(dict.fromkeys(setting for _, setting in results))
  fig = figure.Figure(figsize=(9, 1.2 + 0.55 * len(names)), layout='constrained')
  for axes, group in zip(fig.subplots(1, 2, sharey=True), GROUPS):
    axes.axvline(0, color='0.6', lw=1)
    for i, setting in enumerate(settings):
      for y, name in enumerate(names):
        pair = [list(results[one, setting][group].values())[-1] for one in ('redgrape', name)]
        found = paired.difference(*pair)
        place = y + 0.7 * ((i + 0.5) / len(settings) - 0.5)
        colour = COLOURS[i % len(COLOURS)]
        ends = [found.low, found.high] if found.num_seeds > 1 else [found.mean] * 2
        axes.plot(ends, [place] * 2, color=colour, lw=1.5)
        label = f'IR, alpha {setting}' if y == 0 and group == GROUPS[0] else None
        axes.plot(found.mean, place, 'o', ms=4, color=colour, label=label)
    axes.set(title=f'{group} accuracy', xlabel='RedGrape minus the method, points')
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
  fig.legend(loc='outside right center')
  plots.save(fig, path)


def _curves(path: pathlib.Path, results: Mapping[Any, Any]):
  """Accuracy over rounds, means over settings and seeds."""
  names = list(dict.fromkeys(name for name, _ in results))
  fig = figure.Figure(figsize=(9, 3.8), layout='constrained')
  colours = matplotlib.colormaps['tab10']
  for axes, group in zip(fig.subplots(1, 2), GROUPS):
    for i, name in enumerate(names):
      each = [result[group] for (method, _), result in results.items() if method == name]
      rounds = [int(number) for number in each[0]]
      means = np.mean([[statistics.fmean(v) for v in one.values()] for one in each], axis=0)
      style = {'lw': 2.5} if name == 'redgrape' else {'lw': 1.2}
      axes.plot(
        rounds, means, label=name if group == GROUPS[0] else None, color=colours(i), **style
      )
    axes.set(title=f'{group} accuracy, %', xlabel='rounds')
  fig.legend(loc='outside right center')
  plots.save(fig, path)
