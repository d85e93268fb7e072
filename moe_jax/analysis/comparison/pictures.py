"""The comparison as PNG: losses, differences, held-out figures, balance and loads."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, figure, ticker

from moe_jax.analysis import difference_curves, difference_pictures, paired
from moe_jax.analysis.comparison import comparison as comparison_lib
from moe_jax.analysis.comparison import curves, verdicts
from moe_jax.runs import plots

PALETTE = (
  *('#1f5fa8', '#d9480f', '#2b8a3e', '#7048a8', '#c2255c', '#0b7285', '#8f6400'),
  *('#495057', '#5c940d', '#862e9c'),
)
_SPENT = {  # field of `Series` -> what it is
  'tokens': 'tokens trained on',
  'flops': 'training FLOPs',
  'seconds': 'seconds of training steps',
}
Drawn = tuple[pathlib.Path, str]  # a picture and its caption


def draw(found: comparison_lib.Comparison, out: pathlib.Path) -> list[Drawn]:
  """Draws what the runs allow; returns the pictures with their captions.

  Args:
    found: the comparison.
    out: directory of the pictures.
  """
  makers: Sequence[Callable[[comparison_lib.Comparison, pathlib.Path], Drawn | None]] = (
    _differences,
    _losses,
    _held_out,
    _balance,
    _loads,
  )
  with matplotlib.rc_context(plots.STYLE):
    drawn = [make(found, out) for make in makers]
  return [one for one in drawn if one is not None]


def colours(found: comparison_lib.Comparison) -> dict[str, str]:
  """The colour of each group, which it has on the page too."""
  return {one.name: PALETTE[i % len(PALETTE)] for i, one in enumerate(found.groups)}


def _differences(found: comparison_lib.Comparison, out: pathlib.Path) -> Drawn | None:
  at_end = verdicts.at_end(found.claims())
  panels = []
  for one in found.groups:
    curve = found.curve(one.name) if one.name != found.baseline else None
    if curve is not None:
      verdict = at_end.get(one.name) or found.curve_verdict(one.name)
      title = f'{one.name} − {found.baseline}'
      panels.append(difference_pictures.Panel(title, curve, verdict))
  if not panels:
    return None
  difference_pictures.draw(out / 'differences.png', panels)
  caption = (
    f'Training loss minus that of {found.baseline}, same seed and batch: mean over seeds, band of '
    f'its 95 % interval, crossover with its own. {difference_curves.RULE}'
  )
  return out / 'differences.png', caption


def _losses(found: comparison_lib.Comparison, out: pathlib.Path) -> Drawn | None:
  series = {name: curves.thinned(s) for name, s in found.series.items() if s is not None}
  if not series:
    return None
  fig = figure.Figure(figsize=(12, 4), layout='constrained')
  panels = fig.subplots(1, 3, sharey=True)
  for axes, (key, title) in zip(panels, _SPENT.items()):
    for name, one in series.items():
      band(axes, getattr(one, key), one.values['loss'], name, colours(found)[name])
    axes.set_xlabel(title)
    axes.grid(True)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  panels[0].set_ylabel('training loss [nats per token]')
  panels[0].legend(frameon=False, fontsize=8)
  plots.save(fig, out / 'losses.png')
  return (
    out / 'losses.png',
    f'Training loss, mean over seeds and band of its 95 % interval. {_NOTE}',
  )


_NOTE = comparison_lib.COST_NOTE


def band(axes: Any, x: np.ndarray, values: np.ndarray, label: str, colour: Any):
  """Draws mean and 95 % interval of values [seeds, points]; a gap where a seed has none."""
  around = [paired.interval(column.tolist()) for column in values.T]
  axes.plot(x, [one.mean for one in around], label=label, color=colour, lw=1.6)
  if len(values) > 1:
    low, high = [one.low for one in around], [one.high for one in around]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def _held_out(found: comparison_lib.Comparison, out: pathlib.Path) -> Drawn | None:
  keys = [k for k in verdicts.FIGURES if any(verdicts.held_out(g, k) for g in found.groups)]
  if not keys:
    return None
  height = 1.2 + 0.4 * len(found.groups)
  fig = figure.Figure(figsize=(5.5 * len(keys), height), layout='constrained')
  panels = fig.subplots(1, len(keys), sharey=True, squeeze=False)[0]
  for axes, key in zip(panels, keys):
    for y, group in enumerate(found.groups):
      values, around = list(verdicts.held_out(group, key).values()), verdicts.interval(group, key)
      colour = colours(found)[group.name]
      axes.plot(values, [y] * len(values), 'o', color=colour, alpha=0.4, ms=5)
      if around is not None:
        axes.plot([around.mean], [y], 'D', color=colour, ms=7)
        if around.num_seeds > 1:
          axes.plot([around.low, around.high], [y, y], color=colour, lw=2)
    axes.set_xlabel(verdicts.FIGURES[key][0])
    axes.grid(True, axis='x')
  panels[0].set_yticks(range(len(found.groups)), [one.name for one in found.groups])
  panels[0].set_ylim(len(found.groups) - 0.5, -0.5)
  plots.save(fig, out / 'held_out.png')
  caption = 'Held-out figures: a dot per seed, mean and its 95 % interval over seeds'
  return (
    out / 'held_out.png',
    f'{caption}; differences are paired, and so tell more than these bars',
  )


def _balance(found: comparison_lib.Comparison, out: pathlib.Path) -> Drawn | None:
  balances = {name: one[0] for name, one in found.routing.items() if one is not None}
  if not balances:
    return None
  fig = figure.Figure(figsize=(7, 4), layout='constrained')
  axes = fig.subplots()
  for name, one in balances.items():
    colour = colours(found)[name]
    axes.plot(one.steps, one.max_vio.T, color=colour, alpha=0.35, lw=1)
    axes.plot(one.steps, one.max_vio.mean(axis=0), color=colour, lw=2, label=name)
  axes.set_ylim(bottom=0)
  axes.set_xlabel('optimizer step')
  axes.set_ylabel('MaxVio, mean over seeds')
  axes.legend(frameon=False, fontsize=8)
  axes.grid(True)
  plots.save(fig, out / 'balance.png')
  return (
    out / 'balance.png',
    'MaxVio of a batch over training: a thin line per layer, and their mean',
  )


def _loads(found: comparison_lib.Comparison, out: pathlib.Path) -> Drawn | None:
  loads = {name: one[1] for name, one in found.routing.items() if one is not None}
  if not loads:
    return None
  fig = figure.Figure(
    figsize=(9, 0.6 + sum(0.75 + 0.22 * len(one.relative[-1]) for one in loads.values())),
    layout='constrained',
  )
  heights = [len(one.relative[-1]) + 2 for one in loads.values()]
  panels = fig.subplots(len(loads), 1, squeeze=False, height_ratios=heights)[:, 0]
  top = float(np.clip(max(one.relative[-1].max() for one in loads.values()), 2, 4))
  for axes, (name, one) in zip(panels, loads.items()):
    last = one.relative[-1]
    norm = colors.TwoSlopeNorm(1, vmin=0, vmax=top)
    image = axes.imshow(last, cmap='RdBu_r', norm=norm, aspect='auto', interpolation='none')
    axes.set_yticks(range(len(last)), [f'layer {one.first_layer + i}' for i in range(len(last))])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(min(last.shape[1], 16), integer=True))
    axes.set_title(f'{name}, seed {one.seed}, step {one.steps[-1]}', loc='left', fontsize=10)
  bar = fig.colorbar(image, ax=list(panels), pad=0.02)
  bar.set_label('load / mean load')
  bar.outline.set_visible(False)
  plots.save(fig, out / 'load.png')
  return out / 'load.png', 'Load of each expert relative to the mean of its layer, last batch kept'
