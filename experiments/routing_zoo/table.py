"""From the runs' figures to results.json, the table in README.md and the figure."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import figure

from experiments.common import spread as spread_lib
from moe_jax import atomic_files
from moe_jax.config import schema
from moe_jax.planning import flops
from moe_jax.runs import plots

BASELINE = 'deepseekmoe'  # whose difference to the others is taken seed by seed
SPEED_BASELINE = 'dense'
START, END = '<!-- table: written by the command -->', '<!-- end of table -->'


def write(
  out: pathlib.Path,
  summary: Mapping[str, Sequence[str]],
  configs: Mapping[tuple[str, int], schema.Config],
  results: Mapping[str, Mapping[str, Any]],
  rates: Mapping[str, float],
) -> list[pathlib.Path]:
  """Writes everything and returns the paths.

  Args:
    out: directory; its README.md has a place for the table if it exists.
    summary: by router: (what it is, paper).
    configs: by (router, seed).
    results: by 'router/seed', see `__main__._train`.
    rates: training tokens per second by router.
  """
  names = list(dict.fromkeys(name for name, _ in configs))
  seeds = sorted({seed for _, seed in configs})
  rows = [_row(name, seeds, configs, results, rates) for name in names]
  paths = [out / 'results.json', out / 'zoo.png']
  record = {'seeds': seeds, 'rows': rows, 'runs': dict(results)}
  atomic_files.write_text(paths[0], json.dumps(record, indent=2) + '\n')
  _draw(rows, paths[1])
  text = markdown(rows, seeds)
  readme = out / 'README.md'
  if readme.exists():
    old = readme.read_text(encoding='utf-8')
    if START in old and END in old:
      before, after = old.split(START)[0], old.split(END)[1]
      atomic_files.write_text(readme, f'{before}{START}\n\n{text}\n\n{END}{after}')
      paths.append(readme)
  print(text)
  return paths


def _row(name, seeds, configs, results, rates) -> dict[str, Any]:
  runs = [results[f'{name}/{seed}'] for seed in seeds]
  model = configs[name, seeds[0]].model
  row = {
    'name': name,
    'total_params': flops.count_parameters(model).total,
    'activated_params': flops.count_activated(model).total,
    'bits_per_byte': [r['bits_per_byte'] for r in runs],
    'max_vio': [r['max_vio'] for r in runs],
    'train_drop_rate': [r['train_drop_rate'] for r in runs],
    'tokens_per_second': rates[name],
  }
  if SPEED_BASELINE in rates:
    row['speed_ratio'] = rates[name] / rates[SPEED_BASELINE]
  if f'{BASELINE}/{seeds[0]}' in results:
    base = [results[f'{BASELINE}/{seed}']['bits_per_byte'] for seed in seeds]
    row['difference'] = [a - b for a, b in zip(row['bits_per_byte'], base)]
  return row


def markdown(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
  """The table, best held-out bits per byte first."""
  header = [
    'router',
    'bits per byte',
    f'minus {BASELINE}, by seed',
    'MaxVio_global',
    'dropped, %',
    'tokens/s',
    f'x {SPEED_BASELINE}',
    'parameters, M',
    'activated, M',
  ]
  lines = ['| ' + ' | '.join(header) + ' |', '|' + ' --- |' * len(header)]
  for row in sorted(rows, key=lambda r: statistics.mean(r['bits_per_byte'])):
    cells = [
      f'`{row["name"]}`',
      spread_lib.spread(row['bits_per_byte'], 3),
      '0' if row['name'] == BASELINE else spread_lib.spread(row.get('difference'), 3),
      spread_lib.spread(row['max_vio'], 2),
      spread_lib.spread(row['train_drop_rate'], 1, 100.0),
      f'{row["tokens_per_second"]:,.0f}',
      f'{row["speed_ratio"]:.2f}' if 'speed_ratio' in row else '-',
      f'{row["total_params"] / 1e6:.3f}',
      f'{row["activated_params"] / 1e6:.3f}',
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  note = (
    f'Seeds {", ".join(map(str, seeds))}; mean ± sample standard deviation over seeds. '
    'MaxVio_global is counted over the whole held-out split and averaged over layers; dropped is '
    'the share of the chosen assignments over the last fifth of training; tokens/s is the median '
    'over rounds of the training step alone, all routers timed in turns.'
  )
  return '\n'.join([*lines, '', note])


def _draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path):
  """Held-out bits per byte and MaxVio of every run, a dot per seed, best router on top."""
  rows = sorted(rows, key=lambda r: -statistics.mean(r['bits_per_byte']))
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(9, 1.2 + 0.27 * len(rows)), layout='constrained')
    left, right = fig.subplots(1, 2, sharey=True)
    for y, row in enumerate(rows):
      left.plot(row['bits_per_byte'], [y] * len(row['bits_per_byte']), 'o', color=plots.BLUE, ms=4)
      if None not in row['max_vio']:
        right.plot(row['max_vio'], [y] * len(row['max_vio']), 'o', color=plots.ORANGE, ms=4)
    left.set_yticks(range(len(rows)), [row['name'] for row in rows])
    left.set_xlabel('held-out bits per byte')
    right.set_xlabel('MaxVio_global (0 = balanced)')
    right.set_xlim(left=-0.1)
    for axes in (left, right):
      axes.grid(True, axis='both')
    plots.save(fig, path)
