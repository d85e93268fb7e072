"""What a benchmark leaves behind: JSON, a table, and a picture of the ratios."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure, ticker
from matplotlib.backends import backend_agg

from experiments.common import harness
from moe_jax import atomic_files, errors
from moe_jax.runs import plots

MARKERS = 'osD^v'
HEADER = (
  '| what | variant | ms, median (min-max) | / dense twin | / plain JAX | of peak | x transformers '
  '| temporaries | more |'
)


def table(results: Sequence[harness.Result]) -> str:
  """Markdown; `more` is what only this suite knows."""
  lines = [HEADER, '|' + ' --- |' * (HEADER.count('|') - 1)]
  return '\n'.join([*lines, *map(_line, results)])


def _line(r: harness.Result) -> str:
  ms = [1000 * s for s in (r.seconds_median, r.seconds_min, r.seconds_max)]
  cells = [
    *(r.name, r.variant, '{:.4g} ({:.4g}-{:.4g})'.format(*ms)),
    _number(r.ratio_to_dense, '{:.2f}'),
    _number(r.ratio_to_plain, '{:.2f}'),
    '' if r.ratio_to_peak is None else f'{r.ratio_to_peak:.0%}',
    _number(r.ratio_to_transformers, '{:.2f}'),
    '' if r.peak_bytes is None else f'{r.peak_bytes / 2**20:.1f} MiB',
    ', '.join(f'{key} {_value(value)}' for key, value in r.detail.items()),
  ]
  return f'| {" | ".join(cells)} |'


def _number(value: float | None, form: str) -> str:
  return '' if value is None else form.format(value)


def _value(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def write(out: pathlib.Path, name: str, head: Mapping[str, Any], results: Sequence[harness.Result]):
  """Writes NAME.json, the table NAME.md and the picture NAME.png.

  Lines of an earlier run that this one did not measure stay, with the head of their own run.
  """
  out.mkdir(parents=True, exist_ok=True)
  path = out / f'{name}.json'
  known = read(path) if path.exists() else []
  runs = {(r.name, r.variant): (r, h) for r, h in known}
  runs |= {(r.name, r.variant): (r, dict(head)) for r in results}
  entries = [r.to_json() | {'run': h} for r, h in runs.values()]
  atomic_files.write_text(path, json.dumps(entries, indent=1) + '\n')
  merged = [r for r, _ in runs.values()]
  plots.save(picture(name, merged), out / f'{name}.png')
  title = f'# {name.replace("_", ", ")}'
  command = f'python -m experiments.bench --suite={name.partition("_")[0]}'
  words = f'Written by `{command}`; the columns are explained in [README](../README.md).'
  atomic_files.write_text(out / f'{name}.md', f'{title}\n\n{words}\n\n{table(merged)}\n')


def read(path: pathlib.Path) -> list[tuple[harness.Result, dict[str, Any]]]:
  """Results and the heads of their runs."""
  try:
    pairs = [(entry, entry.pop('run')) for entry in json.loads(path.read_text(encoding='utf-8'))]
    return [(harness.Result(**entry), head) for entry, head in pairs]
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise errors.InputError(f'{path} holds no results ({e}); remove it to start anew') from e


def picture(name: str, results: Sequence[harness.Result]) -> figure.Figure:
  """One line per name, one dot per variant: time over the dense twin's, or milliseconds."""
  ratios = [r for r in results if r.ratio_to_dense is not None]
  shown = [r for r in ratios if r.ratio_to_dense != 1.0] or list(results)
  names = list(dict.fromkeys(r.name for r in shown))
  fig = figure.Figure(figsize=(8, 1.6 + 0.26 * len(names)), layout='constrained')
  backend_agg.FigureCanvasAgg(fig)
  ax = fig.add_subplot()
  for i, variant in enumerate(dict.fromkeys(r.variant for r in shown)):
    own = [r for r in shown if r.variant == variant]
    values = [r.ratio_to_dense if ratios else 1000 * r.seconds_median for r in own]
    lines = [names.index(r.name) for r in own]
    ax.scatter(values, lines, label=variant, marker=MARKERS[i % len(MARKERS)], s=36, zorder=2)
  ax.set_yticks(range(len(names)), names, fontsize=8)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.grid(axis='y', color='0.9')
  ax.set_xscale('log')
  ax.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  ax.xaxis.set_minor_formatter(ticker.FormatStrFormatter('%g'))
  ax.tick_params(axis='x', which='both', labelsize=8)
  if ratios:
    ax.axvline(1.0, color=plots.ORANGE, lw=1, zorder=1)
  what = 'time / time of the dense twin (line)' if ratios else 'milliseconds, median'
  ax.set_xlabel(f'{what}, logarithmic')
  ax.set_title(name.replace('_', ', '))
  fig.legend(loc='outside lower center', ncols=4, fontsize=8)
  return fig
