"""Pictures of a run: the loss curve, and which expert of which layer carries how much load.

Drawn through matplotlib's objects, not pyplot: no global state, no window, safe in any thread.
"""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, figure, ticker
from matplotlib.backends import backend_agg

from moe_jax import files

_Path = str | os.PathLike[str]
_STYLE = {
  'font.size': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'grid.color': '0.9',
}
_BLUE, _ORANGE = '#1f5fa8', '#d9480f'
_TOP_OF_SCALE = 4.0  # relative load at which the heat map's colour saturates


def loss_curve(
  metrics: Sequence[Mapping[str, Any]],
  path: _Path,
  title: str,
  heldout: Sequence[tuple[int, float]] | None = None,
):
  """Training loss over steps, raw and smoothed, with the learning rate in a strip below.

  Args:
    metrics: objects of `metrics.jsonl` (`step`, `loss`, `lr`); a loss of None becomes a gap.
    path: PNG to write.
    title: what run this is.
    heldout: (step, loss) pairs of the held-out evaluations.
  """
  step = np.array([m['step'] for m in metrics])
  loss = np.array([m['loss'] for m in metrics], dtype=float)
  with matplotlib.rc_context(_STYLE):
    fig = figure.Figure(figsize=(8, 5.2), layout='constrained')
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    half = min(len(loss) // 60, 50)
    raw = {'alpha': 0.25, 'linewidth': 1} if half else {'linewidth': 1.8, 'marker': '.'}
    top.plot(step, loss, color=_BLUE, **raw, label='training')
    if half:
      median = _running_median(loss, half)
      top.plot(step, median, color=_BLUE, linewidth=1.8, label='training, running median')
    if heldout:
      marks = {'color': _ORANGE, 'marker': 'o', 'markersize': 5, 'linewidth': 1.2}
      top.plot(*zip(*heldout), **marks, label='held-out')
      _annotate_last(top, heldout[-1])
    _limit_to_bulk(top, loss)
    top.set_title(title, loc='left')
    top.set_ylabel('cross-entropy [nats per token]')
    top.legend(frameon=False)
    bottom.plot(step, np.array([m['lr'] for m in metrics], dtype=float), color='0.35')
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel('learning\nrate')
    bottom.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    bottom.set_xlabel('optimizer step')
    bottom.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for axes in (top, bottom):
      axes.grid(True)
    _save(fig, path)


def expert_load(load: np.ndarray, path: _Path, title: str, *, first_layer: int = 0):
  """Heat map of each expert's load relative to its layer's mean; 1 is balanced.

  Args:
    load: [layers, E] tokens (or their share) per routed expert.
    path: PNG to write.
    title: what run this is.
    first_layer: number of the first MoE layer, after the dense ones.
  """
  load = np.asarray(load, dtype=float)
  if load.ndim != 2 or not load.size:
    raise ValueError(f'load must be [layers, experts], not of shape {load.shape}')
  mean = load.mean(axis=1, keepdims=True)
  relative = load / np.where(mean > 0, mean, 1)
  layers, experts = relative.shape
  size = (np.clip(2.6 + 0.16 * experts, 6, 14), np.clip(1.7 + 0.32 * layers, 2.6, 14))
  with matplotlib.rc_context({**_STYLE, 'axes.spines.left': False, 'axes.spines.bottom': False}):
    fig = figure.Figure(figsize=size, layout='constrained')
    axes = fig.subplots()
    # Half the scale below 1 and half above: white is always balanced. The top is capped, lest one
    # overloaded expert bleach all the others; MaxVio tells its figure.
    top = float(np.clip(relative.max(), 2, _TOP_OF_SCALE))
    norm = colors.TwoSlopeNorm(1, vmin=0, vmax=top)
    image = axes.imshow(relative, cmap='RdBu_r', norm=norm, aspect='auto', interpolation='none')
    axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which='minor', color='white', linewidth=0.6)
    axes.tick_params(which='minor', length=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(min(experts, 16), integer=True))
    axes.set_yticks(range(layers), [str(first_layer + i) for i in range(layers)])
    axes.set_xlabel('routed expert')
    axes.set_ylabel('layer')
    axes.set_title(title, loc='left')
    _write_max_vio(axes, relative.max(axis=1) - 1)
    extend = 'max' if relative.max() > top else 'neither'
    bar = fig.colorbar(image, ax=axes, pad=0.02, extend=extend)
    bar.set_label('load / mean load')
    above = np.arange(1.5, top + 0.01, 0.5)
    bar.set_ticks([0, 0.5, 1, *above])
    bar.outline.set_visible(False)
    _save(fig, path)


def _write_max_vio(axes: Any, max_vio: np.ndarray):
  """Writes each layer's MaxVio, (max load - mean load) / mean load, beside its row."""
  style = {'transform': axes.get_yaxis_transform(), 'fontsize': 9}
  axes.text(1.01, -0.6, 'MaxVio', va='bottom', **style)
  for row, value in enumerate(max_vio):
    axes.text(1.01, row, f'{value:.2f}', va='center', **style)


def _running_median(values: np.ndarray, half: int) -> np.ndarray:
  """Centred median over `2 * half + 1` values, fewer at the ends; a spike leaves no trace."""
  smooth = np.full(len(values), np.nan)
  for i in range(len(values)):
    reach = min(half, i, len(values) - 1 - i)  # even on both sides, else the ends would be bent
    window = values[i - reach : i + reach + 1]
    known = window[np.isfinite(window)]
    if known.size:
      smooth[i] = np.median(known)
  return smooth


def _limit_to_bulk(axes: Any, loss: np.ndarray):
  """Keeps one spike from flattening the curve: the scale ends a little above the start."""
  known = loss[np.isfinite(loss)]
  if known.size:
    start = known[: max(1, known.size // 20)].max()
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, start + 0.1 * (start - min(low, start)) + 1e-3))


def _annotate_last(axes: Any, point: tuple[int, float]):
  axes.annotate(
    f'{point[1]:.3f}',
    point,
    xytext=(0, 8),
    textcoords='offset points',
    ha='center',
    color=_ORANGE,
  )


def _save(fig: figure.Figure, path: _Path):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  png = io.BytesIO()
  backend_agg.FigureCanvasAgg(fig)
  fig.savefig(png, format='png', dpi=130)
  files.write_bytes(path, png.getvalue())
