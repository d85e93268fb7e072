"""The figures of a record: one PNG per part that was measured."""

import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure
from matplotlib.backends import backend_agg

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


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Mean and half the width of its interval; 0 for a single value."""
  found = paired.interval([float(v) for v in values])
  return found.mean, found.high - found.mean if found.num_seeds > 1 else 0.0


def _lines(axes: Any, by_unit: Sequence[Sequence[float]], label: str, color: str):
  """A line over layers with its band: one list over layers per unit."""
  columns = list(zip(*by_unit))
  mean, error = np.transpose([_mean_and_error(column) for column in columns])
  layers = np.arange(1, len(columns) + 1)
  axes.plot(layers, mean, marker='.', color=color, label=label)
  axes.fill_between(layers, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]], colors: Sequence[str]):
  """Groups of horizontal bars with intervals: group -> series -> values per unit."""
  names = list(groups)
  series = list(next(iter(groups.values())))
  height = 0.8 / len(series)
  for i, (name, color) in enumerate(zip(series, colors)):
    mean, error = np.transpose([_mean_and_error(groups[group][name]) for group in names])
    place = np.arange(len(names)) + (i - (len(series) - 1) / 2) * height
    axes.barh(place, mean, height * 0.9, xerr=error, color=color, label=name, ecolor='0.3')
  axes.set_yticks(np.arange(len(names)), names)
  axes.invert_yaxis()
  axes.grid(axis='x')


def flow(record: Record, axes: Any):
  """S_wp, S_pq and S_ww by layer, as shares of their sum."""
  for key, (label, color) in FLOWS.items():
    _lines(axes, record['flow']['abs_of_sum'][key], label, color)
  axes.set_xlabel('layer')
  axes.set_ylabel('share of the sum of the three')
  axes.set_ylim(0, 1)
  axes.legend(frameon=False)


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
  axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=2)


def correlation(record: Record, axes: Any):
  """AUCROC by layer with its interval, and R."""
  found = record['correlation']
  auc, layers = np.asarray(found['auc']), np.arange(1, len(found['auc']) + 1)
  axes.plot(layers, auc, marker='.', color=plots.BLUE, label='AUCROC')
  axes.fill_between(layers, found['low'], found['high'], color=plots.BLUE, alpha=0.2, linewidth=0)
  axes.plot(layers, found['cumulative'], '--', color=plots.ORANGE, label='R, cumulative')
  axes.axhline(0.5, color='0.8', linewidth=1)
  axes.set_xlabel('layer')
  axes.legend(frameon=False)


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
  axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=3)


def confusion(record: Record, axes: Any):
  """Predicted against measured confusion, a point per pair of classes."""
  pairs = [pair for pair in record['confusion']['pairs'] if pair[3] == pair[3]]
  axes.scatter([p[2] for p in pairs], [p[3] for p in pairs], color=plots.BLUE, s=18)
  for one, two, predicted, measured, _ in sorted(pairs, key=lambda p: p[3])[:4]:
    axes.annotate(f'{one}, {two}', (predicted, measured), fontsize=8)
  axes.set_xlabel('predicted from keys; 0 = most confused')
  axes.set_ylabel('measured AUC; 1 = not confused')


def experts(record: Record, axes: Any):
  """How far label words and other tokens choose other experts, by MoE layer."""
  found = record['experts']
  layers = np.arange(1, len(found['separation_text']) + 1)
  axes.plot(layers, found['separation_text'], marker='.', color=plots.ORANGE, label='from texts')
  axes.plot(layers, found['separation_format'], marker='.', color=GREY, label='from formatting')
  axes.set_xlabel('MoE layer')
  axes.set_ylabel("total variation of label words' choices")
  axes.set_ylim(0, 1)
  axes.legend(frameon=False)


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
    axes = fig.subplots(1, len(records), squeeze=False)[0]
    for one, (title, record) in zip(axes, records.items()):
      picture(record, one)
      one.set_title(title)
    buffer = io.BytesIO()
    backend_agg.FigureCanvasAgg(fig).print_png(buffer)
  atomic_files.write_bytes(path, buffer.getvalue())
