"""The report of a run: accuracies of groups of classes, curve, accuracy of each class."""

import json
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import figure

from experiments.common import html_report, spread
from moe_jax import atomic_files
from moe_jax.federated import accuracy, run
from moe_jax.federated import settings as settings_lib
from moe_jax.runs import plots


def write(
  settings: settings_lib.Settings, seeds: Sequence[int], curve: run.Curve, workdir: pathlib.Path
) -> str:
  """Writes results.json, curve.png, report.md and report.html; returns the last accuracies.

  Args:
    settings: of the run.
    seeds: of the run.
    curve: what it measured.
    workdir: where to.
  """
  groups = accuracy.grouped(curve.right, curve.totals)
  record = {
    'seeds': list(seeds),
    'rounds': curve.rounds.tolist(),
    'right': curve.right.tolist(),
    'totals': curve.totals.tolist(),
  }
  atomic_files.write_text(workdir / 'results.json', json.dumps(record) + '\n')
  last = {name: spread.spread(values[-1].tolist(), 1, 100) for name, values in groups.items()}
  picture = draw(workdir / 'curve.png', curve)
  by_class = (curve.right[-1] / curve.totals).mean(axis=0)
  blocks = [
    html_report.Heading(f'{settings.method} on {settings.dataset}', 1),
    html_report.Text(
      f'{settings.rules.what}. Imbalance {settings.imbalance:g}, alpha {settings.alpha:g}, '
      f'{settings.clients_per_round} of {settings.clients} clients a round, '
      f'{int(curve.rounds[-1])} rounds, {len(seeds)} seed(s); accuracy on the balanced '
      'test set in %, mean over classes, then mean and standard deviation over seeds.'
    ),
    html_report.Table(list(last), [list(last.values())]),
    picture,
    html_report.Heading('By class'),
    html_report.Table(
      ['class', 'test images', 'accuracy, %'],
      [
        [str(c), str(total), f'{100 * share:.1f}']
        for c, (total, share) in enumerate(zip(curve.totals, by_class))
      ],
    ),
  ]
  html_report.write(blocks, workdir)
  return f'{workdir / "report.html"}: ' + ', '.join(f'{k} {v} %' for k, v in last.items())


def draw(path: pathlib.Path, curve: run.Curve) -> html_report.Picture:
  """Draws the accuracy of each group of classes over rounds, means over seeds."""
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(7, 3.6), layout='constrained')
    axes = fig.subplots()
    for name, values in accuracy.grouped(curve.right, curve.totals).items():
      axes.plot(curve.rounds, 100 * values.mean(axis=1), label=name, marker='.')
      low, high = (100 * np.quantile(values, q, axis=1) for q in (0, 1))
      axes.fill_between(curve.rounds, low, high, alpha=0.15)
    axes.set(xlabel='rounds', ylabel='accuracy, %', ylim=(0, 102))
    axes.legend(loc='lower right')
    plots.save(fig, path)
  return html_report.Picture(path, 'Accuracy over rounds; bands: least and most of the seeds')
