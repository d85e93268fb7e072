"""Tables and the figure of what was trained."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.topology import trials
from moe_jax.analysis import paired

Figures = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> figure -> one per split
F1 = 'weighted_f1'


def arms_table(arms: Figures) -> str:
  """Markdown: means over splits, and differences of the last arm to the first, split by split."""
  first, last = list(arms)[0], list(arms)[-1]
  head = ['figure', *arms, *([f'{last} - {first}'] if last != first else [])]
  rows = []
  for name in arms[first]:
    row = [name, *(f'{statistics.fmean(arm[name]):.3f}' for arm in arms.values())]
    if last != first:
      row.append(paired.difference(arms[last][name], arms[first][name]).text())
    rows.append(row)
  return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *rows])


def gain(unit: Mapping[str, Any]) -> paired.Interval:
  """ReNode's weighted F1 minus the plain one, in points, over splits."""
  arms = unit['arms']
  return paired.difference(*([100 * f for f in arms[arm][F1]] for arm in ('renode', 'plain')))


def study_table(units: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: a row per unit of the study, with verdicts by itself and corrected for all rows.

  Args:
    units: records of `study.train_unit`.
  """
  head = [
    'graph', 'rate', 'labels', 'loss', 'model', 'F1 plain', 'ReNode - plain, points', 'verdict',
    'verdict (Holm)', 'train accuracy plain, ReNode', 'r of Totoro and F1', 'r of Totoro and gain',
  ]  # fmt: skip
  rows = []
  gains_of = [
    [b - a for a, b in zip(*(u['arms'][arm][F1] for arm in ('plain', 'renode')))] for u in units
  ]
  verdicts = [paired.verdict(gain(unit), 'higher') for unit in units]
  corrected = paired.corrected(verdicts, [paired.p_value(one, 'higher') for one in gains_of])
  for unit, gains, alone, together in zip(units, gains_of, verdicts, corrected):
    arms, key, found = unit['arms'], unit['key'], gain(unit)
    rows.append(
      [
        key['graph'], key['rate'],
        'even' if key['imbalance'] == 1 else f'{key["imbalance"]:g} : 1',
        key['loss'].replace('_', ' '), key['model'] + _ranks(key),
        f'{100 * statistics.fmean(arms["plain"][F1]):.1f}', found.text(1),
        alone, together,
        ', '.join(f'{statistics.fmean(arms[arm]["train_accuracy"]):.2f}' for arm in arms),
        correlation(unit['totoro'], arms['plain'][F1]), correlation(unit['totoro'], gains),
      ]
    )  # fmt: skip
  return _table(head, rows)


def correlation(first: Sequence[float], second: Sequence[float]) -> str:
  """Pearson's correlation with its 95 % interval; - where one of both does not vary."""
  if len(set(first)) < 2 or len(set(second)) < 2:
    return '-'
  r, low, high = trials.correlation(first, second)
  return f'{r:+.2f} [{low:+.2f}, {high:+.2f}]'


def draw(units: Sequence[Mapping[str, Any]], path: pathlib.Path):
  """Draws the differences of every unit, and F1 against Totoro of each graph's GCN."""
  import matplotlib.figure
  from matplotlib.backends import backend_agg

  figure = matplotlib.figure.Figure(figsize=(11, 1.6 + 0.19 * len(units)), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
  graphs = list(dict.fromkeys(unit['key']['graph'] for unit in units))
  colors = {graph: f'C{i}' for i, graph in enumerate(graphs)}
  for i, unit in enumerate(units):
    found, color = gain(unit), colors[unit['key']['graph']]
    left.plot([found.low, found.high], [i, i], color=color, lw=2)
    left.plot(found.mean, i, 'o', color=color, ms=4)
  left.axvline(0, color='0.5', lw=1)
  left.set_yticks(range(len(units)), [name(unit['key']) for unit in units], fontsize=7)
  left.invert_yaxis()
  left.margins(y=0.01)
  ticks = (-40, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 40)
  left.set_xscale('symlog', linthresh=2)  # most are within a point, a few far away
  left.set_xticks(ticks, [f'{tick:+d}' if tick else '0' for tick in ticks], fontsize=7)
  left.minorticks_off()
  left.set_xlabel('weighted F1 with ReNode - without, points (95 % over paired splits)')
  for unit in units:
    key = unit['key']
    if name(key) != f'{key["graph"]}, gcn, constant':
      continue
    totoro = unit['totoro']
    mean = statistics.fmean(totoro)
    spread = statistics.stdev(totoro)
    f1 = unit['arms']['plain'][F1]
    right.plot(
      [(t - mean) / spread for t in totoro],
      [100 * (f - statistics.fmean(f1)) for f in f1],
      'o', ms=4, color=colors[key['graph']],
      label=f'{key["graph"]}: r = {correlation(totoro, f1)}',
    )  # fmt: skip
  right.set_xlabel("a split's sum of Totoro, standardised per graph")
  right.set_ylabel("GCN's weighted F1 - its mean, points (no ReNode, constant rate)")
  right.legend(fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})


def name(key: Mapping[str, Any]) -> str:
  """A unit in a few words."""
  uneven = '' if key['imbalance'] == 1 else f', {key["imbalance"]:g}:1, {key["loss"]}'
  return f'{key["graph"]}, {key["model"]}, {key["rate"]}{uneven}{_ranks(key)}'


def _ranks(key: Mapping[str, Any]) -> str:
  return '' if key.get('ranks', 'all') == 'all' else ', ranks by class'
