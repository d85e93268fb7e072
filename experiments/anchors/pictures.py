"""The figures of a record: one PNG per part that was measured."""

import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure
from matplotlib.backends import backend_agg

from experiments.anchors import claims
from moe_jax import atomic_files
from moe_jax.analysis import paired
from moe_jax.runs import plots

Record = Mapping[str, Any]
GREY, GREEN = '0.55', '#2b8a3e'
FLOWS = {
  'wp': ('$S_{wp}$: text to label words', plots.BLUE),
  'pq': ('$S_{pq}$: label words to the last token', plots.ORANGE),
  'ww': ('$S_{ww}$: all other pairs', GREY),
}
ARMS = {
  'everything': 'whole cache',
  'hidden_anchor': 'hidden anchors',
  'hidden_anchor_near': 'hidden anchors, query moved up',
  'text_anchor': 'anchors as text',
  'hidden_random': 'random words',
  'hidden_random_top': 'best of random words',
  'hidden_labels_only': 'label words alone',
}


FEW = 8  # units up to which each is drawn by itself, in place of an interval


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Mean and half the width of its interval; 0 for few values, which are drawn one by one."""
  found = paired.interval([float(v) for v in values])
  return found.mean, found.high - found.mean if found.num_seeds > FEW else 0.0


def _lines(axes: Any, by_unit: Sequence[Sequence[float]], label: str, color: str):
  """The mean over layers with its band, or with a thin line per unit: a list over layers each."""
  columns = list(zip(*by_unit))
  mean, error = np.transpose([_mean_and_error(column) for column in columns])
  layers = _layers(axes, len(columns))
  axes.plot(layers, mean, marker='.', color=color, label=label)
  if len(by_unit) > FEW:
    axes.fill_between(layers, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
  elif len(by_unit) > 1:
    axes.plot(layers, np.transpose(by_unit), color=color, alpha=0.4, linewidth=0.8)


def _layers(axes: Any, count: int) -> np.ndarray:
  """The layers' numbers from 1 on, as ticks where there is room for all."""
  layers = np.arange(1, count + 1)
  if count <= 12:
    axes.set_xticks(layers)
  return layers


def _bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]], colors: Sequence[str]):
  """Groups of horizontal bars from 0 to 1, with intervals or with a dot per unit.

  Args:
    axes: of matplotlib.
    groups: group -> series -> values per unit.
    colors: one per series.
  """
  names = list(groups)
  series = list(next(iter(groups.values())))
  height = 0.8 / len(series)
  for i, (name, color) in enumerate(zip(series, colors)):
    units = [groups[group][name] for group in names]
    mean, error = np.transpose([_mean_and_error(values) for values in units])
    place = np.arange(len(names)) + (i - (len(series) - 1) / 2) * height
    errors = error if error.any() else None
    axes.barh(place, mean, height * 0.9, xerr=errors, color=color, label=name, ecolor='0.3')
    for y, values in zip(place, units):
      if 1 < len(values) <= FEW:
        axes.plot(values, [y] * len(values), '.', color='0.15', markersize=4, clip_on=False)
  axes.set_yticks(np.arange(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.set_xlim(0, 1)
  axes.grid(axis='x')


def flow(record: Record, axes: Any):
  """S_wp, S_pq and S_ww by layer, as shares of their sum."""
  for key, (label, color) in FLOWS.items():
    _lines(axes, record['flow']['abs_of_sum'][key], label, color)
  axes.set_xlabel('layer')
  axes.set_ylabel('share of the sum of the three')
  axes.set_ylim(0, 1)


def blocking(record: Record, axes: Any):
  """Label loyalty with label words or random words isolated."""
  found = record['blocking']
  groups: dict[str, dict[str, Sequence[float]]] = {}
  for key in sorted(found, key=lambda k: (k.split('/')[0], int(k.split('/')[1]))):
    end, count, words = key.split('/')
    group = groups.setdefault(f'{end} {count}', {})
    group[f'{words} words'] = found[key]['label_loyalty']
  _bars(axes, groups, (plots.ORANGE, GREY))
  axes.set_xlabel('label loyalty')
  axes.set_ylabel('blocked layers')


def correlation(record: Record, axes: Any):
  """AUCROC by layer with its interval, or a line per run, and R."""
  found = {key: np.asarray(value, float) for key, value in record['correlation'].items()}
  layers = _layers(axes, len(found['auc']))
  axes.plot(layers, found['auc'], marker='.', color=plots.BLUE, label='AUCROC')
  if 'by_run' in found:
    axes.plot(layers, np.transpose(found['by_run']), color=plots.BLUE, alpha=0.4, linewidth=0.8)
  else:
    band = {'color': plots.BLUE, 'alpha': 0.2, 'linewidth': 0}
    axes.fill_between(layers, found['low'], found['high'], **band)
  axes.plot(layers, found['cumulative'], '--', color=plots.ORANGE, label='R, cumulative')
  axes.axhline(0.5, color='0.8', linewidth=1)
  axes.set_xlabel('layer')


def reweighting(record: Record, axes: Any):
  """Accuracy as it is, with more shots and with learned factors."""
  found = record['reweighting']
  groups = {'one shot per class': {'accuracy': record['accuracy']}}
  if 'more_shots' in found:
    shots = found['more_shots']
    groups[f'{shots["shots"]} shots per class'] = {'accuracy': shots['accuracy']}
  for key in sorted(k for k in found if k.startswith('rate_')):
    groups[f're-weighted, rate {key.removeprefix("rate_")}'] = {'accuracy': found[key]['accuracy']}
  _bars(axes, groups, (plots.BLUE,))
  axes.set_xlabel('accuracy')


def compression(record: Record, axes: Any):
  """Loyalties and accuracy with parts of the cache."""
  arms = record['compression']['arms']
  named = {'label loyalty': 'label_loyalty', 'word loyalty': 'word_loyalty', 'accuracy': 'accuracy'}
  groups = {
    title: {name: arms[key][field] for name, field in named.items()}
    for key, title in ARMS.items()
    if key in arms
  }
  _bars(axes, groups, (plots.ORANGE, plots.BLUE, GREY))
  axes.set_xlabel('share')


def confusion(record: Record, axes: Any):
  """Predicted against measured confusion, a point per pair of classes."""
  pairs = claims.asked_pairs(record)
  axes.scatter([p[2] for p in pairs], [p[3] for p in pairs], color=plots.BLUE, s=18)
  for one, two, predicted, measured, _ in sorted(pairs, key=lambda p: p[3])[:4]:
    axes.annotate(f'{one}, {two}', (predicted, measured), fontsize=8)
  axes.set_xlabel('predicted from keys; 0 = most confused')
  axes.set_ylabel('measured AUC; 1 = not confused')


def experts(record: Record, axes: Any):
  """How far label words and other tokens choose other experts, by MoE layer."""
  found = record['experts']
  layers = _layers(axes, len(found['separation_text']))
  axes.plot(layers, found['separation_text'], marker='.', color=plots.ORANGE, label='from texts')
  axes.plot(layers, found['separation_format'], marker='.', color=GREY, label='from formatting')
  axes.set_xlabel('MoE layer')
  axes.set_ylabel("total variation of label words' choices")
  axes.set_ylim(0, 1)


PICTURES: dict[str, Callable[[Record, Any], None]] = {
  'flow': flow,
  'blocking': blocking,
  'correlation': correlation,
  'reweighting': reweighting,
  'compression': compression,
  'confusion': confusion,
  'experts': experts,
}


def draw(record: Record, directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes a PNG for every part of a record; returns their paths by part."""
  written = {}
  for name, picture in PICTURES.items():
    if name in record:
      written[name] = directory / f'{name}.png'
      _save(written[name], {'': record}, picture)
  return written


def draw_side_by_side(
  records: Mapping[str, Record], parts: Sequence[str], directory: pathlib.Path
) -> dict[str, pathlib.Path]:
  """The same of several models in one row of axes per part."""
  written = {}
  for name in parts:
    own = {title: record for title, record in records.items() if name in record}
    if own:
      written[name] = directory / f'{name}.png'
      _save(written[name], own, PICTURES[name])
  return written


def _save(
  path: pathlib.Path, records: Mapping[str, Record], picture: Callable[[Record, Any], None]
):
  with matplotlib.rc_context(plots.STYLE):
    wide = 7 if len(records) == 1 else 4.6 * len(records)
    fig = figure.Figure(figsize=(wide, 4), layout='constrained')
    axes = fig.subplots(1, len(records), squeeze=False, sharey=True)[0]
    for one, (title, record) in zip(axes, records.items()):
      picture(record, one)
      one.set_title(title)
      one.label_outer()
    handles, labels = axes[0].get_legend_handles_labels()
    if len(handles) > 1:  # one series is named by its axis
      fig.legend(handles, labels, loc='outside upper center', ncols=len(handles), frameon=False)
    buffer = io.BytesIO()
    backend_agg.FigureCanvasAgg(fig).print_png(buffer)
  atomic_files.write_bytes(path, buffer.getvalue())
