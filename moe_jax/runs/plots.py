"""Pictures of a run: the loss curve, the load of every expert, and routing over training.

Drawn through matplotlib's objects, not pyplot: no global state, no window, safe in any thread.
"""

import io
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, figure, ticker
from matplotlib.backends import backend_agg

from moe_jax import atomic_files
from moe_jax.runs import plot_text

Path = str | os.PathLike[str]
STYLE: dict[Any, Any] = {
  'font.size': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'grid.color': '0.9',
}
BLUE, ORANGE = '#1f5fa8', '#d9480f'
_TOP_OF_SCALE = 4.0  # relative load at which the heat map's colour saturates
_MAX_WRITTEN_DEVICES = 16  # more cells than its square would not hold their figures

# Of `routing_figures.figures`: key -> (what it is, unit). The others go by their key.
_ROUTING = {
  'max_vio': ('MaxVio: max load / mean load - 1', 'mean loads'),
  'drop_rate': ('dropped assignments', 'share'),
  'gate_entropy': ('gate entropy', 'nats per token'),
  'load_entropy': ('load entropy; 1 = balanced', 'share of ln E'),
  'top_k_margin': ('top-K margin', 'score'),
  'bias_norm': ('norm of the expert bias', 'score'),
  'expert_similarity': ('expert similarity', 'mean cosine'),
}
_OVERVIEW = (
  'max_vio',
  'drop_rate',
  'gate_entropy',
  'load_entropy',
  'top_k_margin',
  'bias_norm',
)
_History = Sequence[tuple[int, Mapping[str, np.ndarray]]]


def loss_curve(
  metrics: Sequence[Mapping[str, Any]],
  path: Path,
  title: str,
  heldout: Sequence[tuple[int, float]] | None = None,
  what: str = 'cross-entropy [nats per token]',
):
  """Training loss over steps, raw and smoothed, with the learning rate in a strip below.

  Args:
    metrics: objects of `metrics.jsonl` (`step`, `loss`, `lr`); a loss of None becomes a gap.
    path: PNG to write.
    title: what run this is.
    heldout: (step, loss) pairs of the held-out evaluations.
    what: the loss and its unit.
  """
  step = np.array([m['step'] for m in metrics])
  loss = np.array([m['loss'] for m in metrics], dtype=float)
  with matplotlib.rc_context(STYLE):
    fig = figure.Figure(figsize=(8, 5.2), layout='constrained')
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    half = min(len(loss) // 60, 50)
    raw = {'alpha': 0.25, 'linewidth': 1} if half else {'linewidth': 1.8, 'marker': '.'}
    top.plot(step, loss, color=BLUE, **raw, label='training')
    if half:
      median = _running_median(loss, half)
      top.plot(step, median, color=BLUE, linewidth=1.8, label='training, running median')
    if heldout:
      marks = {'color': ORANGE, 'marker': 'o', 'markersize': 5, 'linewidth': 1.2}
      top.plot(*zip(*heldout), **marks, label='held-out')
      _annotate_last(top, heldout[-1])
    _limit_to_bulk(top, loss)
    top.set_title(title, loc='left')
    top.set_ylabel(what)
    top.legend(frameon=False)
    bottom.plot(step, np.array([m['lr'] for m in metrics], dtype=float), color='0.35')
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel('learning\nrate')
    bottom.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    bottom.set_xlabel('optimizer step')
    bottom.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for axes in (top, bottom):
      axes.grid(True)
    save(fig, path)


def expert_load(load: np.ndarray, path: Path, title: str, *, first_layer: int = 0):
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
  with matplotlib.rc_context({**STYLE, 'axes.spines.left': False, 'axes.spines.bottom': False}):
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
    save(fig, path)


def _write_max_vio(axes: Any, max_vio: np.ndarray):
  """Writes each layer's MaxVio, (max load - mean load) / mean load, beside its row."""
  style = {'transform': axes.get_yaxis_transform(), 'fontsize': 9}
  axes.text(1.01, -0.6, 'MaxVio', va='bottom', **style)
  for row, value in enumerate(max_vio):
    axes.text(1.01, row, f'{value:.2f}', va='center', **style)


def routing_heatmap(history: _History, key: str, path: Path, title: str, first_layer: int = 0):
  """Heat map of one figure of `routing_figures.figures` over training: steps across, layers down.

  Args:
    history: (step, figures) by rising step, as `routing_figures.read_history` returns them.
    key: a figure with one number per layer.
    path: PNG to write.
    title: what run this is.
    first_layer: number of the first MoE layer, after the dense ones.
  """
  layers = len(history[0][1][key]) if history else 1
  with matplotlib.rc_context(STYLE):
    height = float(np.clip(1.7 + 0.22 * layers, 2.6, 14))
    fig = figure.Figure(figsize=(8, height), layout='constrained')
    fig.suptitle(title, x=0.01, ha='left', fontsize=12)
    _heatmap(fig, fig.subplots(), history, key, first_layer)
    save(fig, path)


def routing_overview(history: _History, path: Path, title: str, first_layer: int = 0):
  """The figures to look at first, a small heat map each; the bias only where there is one.

  Args:
    history: as for `routing_heatmap`.
    path: PNG to write.
    title: what run this is.
    first_layer: number of the first MoE layer, after the dense ones.
  """
  biased = any(f['bias_norm'].any() for _, f in history)
  keys = [key for key in _OVERVIEW if key != 'bias_norm' or biased]
  layers = len(history[0][1]['max_vio']) if history else 1
  rows = -(-len(keys) // 2)
  with matplotlib.rc_context(STYLE):
    height = rows * float(np.clip(1.3 + 0.09 * layers, 2.0, 5.0)) + 0.4
    fig = figure.Figure(figsize=(11, height), layout='constrained')
    fig.suptitle(title, x=0.01, ha='left', fontsize=12)
    panels = fig.subplots(rows, 2).ravel()
    for axes, key in zip(panels, keys):
      _heatmap(fig, axes, history, key, first_layer)
    for axes in panels[len(keys) :]:
      axes.set_axis_off()
    save(fig, path)


def _heatmap(fig: figure.Figure, axes: Any, history: _History, key: str, first_layer: int):
  """Draws one figure's steps and layers into `axes`, with a colour bar; unknown values are grey."""
  name, unit = _ROUTING.get(key, (key, ''))
  axes.set_title(name, loc='left', fontsize=10)
  if not history:
    axes.text(0.5, 0.5, 'no routing figures', transform=axes.transAxes, ha='center', va='center')
    axes.set_axis_off()
    return
  values = np.stack([figures[key] for _, figures in history], axis=-1).astype(float)
  if values.ndim != 2:
    raise ValueError(f'{key} is {values.shape[:-1]} per step; only one number per layer is drawn')
  layers = first_layer - 0.5 + np.arange(len(values) + 1)
  low, high, extend = _scale(values)
  steps = [step for step, _ in history]
  cells = axes.pcolormesh(
    _cell_edges(steps),
    layers,
    np.ma.masked_invalid(values),
    cmap=matplotlib.colormaps['viridis'].with_extremes(bad='0.8'),
    vmin=low,
    vmax=high,
  )
  axes.set_ylim(layers[-1], layers[0])
  axes.yaxis.set_major_locator(ticker.MaxNLocator(min(len(values), 8), integer=True))
  apart = 0.1 * (steps[-1] - steps[0])  # closer labels would run into each other
  few = len(steps) <= 6 and all(b - a >= apart for a, b in zip(steps, steps[1:]))
  axes.xaxis.set_major_locator(
    ticker.FixedLocator(steps) if few else ticker.MaxNLocator(6, integer=True)
  )
  axes.set_xlabel('optimizer step')
  axes.set_ylabel('layer')
  bar = fig.colorbar(cells, ax=axes, pad=0.02, aspect=25, extend=extend)
  bar.set_label(unit)
  bar.outline.set_visible(False)
  if values.min() == values.max():
    bar.set_ticks([low])
    style = {'ha': 'center', 'va': 'center', 'color': 'white'}
    axes.text(0.5, 0.5, f'{low:g} throughout', transform=axes.transAxes, **style)


def _scale(values: np.ndarray) -> tuple[float, float, str]:
  """Ends of a colour scale, and where values lie beyond them.

  One layer's first steps are often far from all others and would leave these a single colour.
  """
  known = values[np.isfinite(values)]
  if not known.size:
    return 0.0, 1.0, 'neither'
  lowest, highest = float(known.min()), float(known.max())
  if lowest == highest:
    return lowest, lowest + 1, 'neither'
  low, high = (float(v) for v in np.quantile(known, (0.05, 0.95)))
  if low == high:  # the few that differ are all there is to see
    return lowest, highest, 'neither'
  reach = 0.5 * (high - low)
  below, above = lowest < low - reach, highest > high + reach
  ends = {(False, False): 'neither', (True, False): 'min', (False, True): 'max'}
  return low if below else lowest, high if above else highest, ends.get((below, above), 'both')


def _cell_edges(steps: Sequence[int]) -> np.ndarray:
  """Borders half-way between neighbours; the last step of a run may come early."""
  at = np.asarray(steps, dtype=float)
  middle = (at[1:] + at[:-1]) / 2
  first, last = (middle[0], middle[-1]) if len(at) > 1 else (at[0] - 0.5, at[0] + 0.5)
  return np.concatenate([[2 * at[0] - first], middle, [2 * at[-1] - last]])


def tokens_sent(matrix: np.ndarray, path: Path, title: str):
  """Heat map of the traffic between virtual devices; what stays at home is no traffic and grey.

  Args:
    matrix: [P, P] tokens of device i with an expert on device j.
    path: PNG to write.
    title: what run this is.
  """
  matrix = np.asarray(matrix, dtype=float)
  devices = len(matrix)
  if matrix.shape != (devices, devices) or not devices:
    raise ValueError(f'matrix must be [devices, devices], not of shape {matrix.shape}')
  sent = np.ma.masked_array(matrix, mask=np.eye(devices, dtype=bool))
  side = float(np.clip(2.5 + 0.5 * devices, 4.5, 12))
  with matplotlib.rc_context({**STYLE, 'axes.spines.left': False, 'axes.spines.bottom': False}):
    fig = figure.Figure(figsize=(side + 1, side), layout='constrained')
    axes = fig.subplots()
    top = float(sent.max()) if devices > 1 and sent.max() > 0 else 1.0
    cmap = matplotlib.colormaps['Blues'].with_extremes(bad='0.88')
    image = axes.imshow(sent, cmap=cmap, vmin=0, vmax=top, interpolation='none')
    if devices <= _MAX_WRITTEN_DEVICES:
      for i, j in np.ndindex(matrix.shape):
        dark = i != j and matrix[i, j] > 0.5 * top
        text = _short(float(matrix[i, j]))
        axes.text(j, i, text, ha='center', va='center', fontsize=8, color='w' if dark else '0.2')
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(ticker.MaxNLocator(min(devices, 16), integer=True))
    axes.set_xlabel('to virtual device (of the expert)')
    axes.set_ylabel('from virtual device (of the token)')
    axes.set_title(textwrap.fill(title, int(10 * side)), loc='left')
    bar = fig.colorbar(image, ax=axes, pad=0.02, shrink=0.85)
    bar.set_label('tokens sent')
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _short(value)))
    bar.outline.set_visible(False)
    save(fig, path)


def _short(count: float) -> str:
  """Three digits: 950, 12.3k, 4.56M."""
  for scale, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if count >= scale:
      return f'{count / scale:#.3g}'.rstrip('.') + unit
  return f'{count:.0f}'


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
    color=ORANGE,
  )


def save(fig: figure.Figure, path: Path):
  """Writes a figure as PNG, whole or not at all."""
  path = pathlib.Path(path)
  png = io.BytesIO()
  plot_text.make_plain(fig)
  backend_agg.FigureCanvasAgg(fig)
  fig.savefig(png, format='png', dpi=130)
  with atomic_files.told_if_full(path, len(png.getvalue())):
    path.parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_bytes(path, png.getvalue())
