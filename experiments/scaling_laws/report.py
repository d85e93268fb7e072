"""The report: verdict first, then tables and figures; and what --dry_run prints."""

import contextlib
import csv
import io
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.scaling_laws import analyse, figures, study
from moe_jax import atomic_files, errors
from moe_jax.analysis import scaling_laws, scaling_power
from moe_jax.config import schema
from moe_jax.planning import flops
from moe_jax.runs import run_record

_DECADES, _BANDS = (0.6, 1.5, 3.0), (scaling_laws.NEAR_OPTIMAL, 0.01)
_PERCENT = round(100 * (scaling_laws.QUANTILES[1] - scaling_laws.QUANTILES[0]))


def plan(scale: study.Scale, points: Sequence[tuple[study.Point, schema.Config]]) -> str:
  """The points of a study with what they cost, and the sum."""
  points = list({point.key: (point, cfg) for point, cfg in points}.values())
  lines = [
    f'Scale {scale.name}: {len(points)} different points. Time at an assumed '
    f'{scale.flops_per_second:.3g} FLOP/s of all training FLOPs, vocabulary included; compiling '
    "and evaluating come on top. Rate and batch of isoflop and heldout are the paper's formula "
    'until the grid is trained, and do not change the cost.',
    '',
    f'{"point":44} {"phase":8} {"M":>9} {"tokens":>13} {"steps":>7} {"FLOPs":>9} {"seconds":>8}',
  ]
  total = {'tokens': 0, 'flops': 0.0}
  for point, cfg in points:
    row = study.row(point, cfg)
    cost = flops.train_flops_per_token(cfg.model) * row['tokens']
    total = {'tokens': total['tokens'] + row['tokens'], 'flops': total['flops'] + cost}
    lines.append(
      f'{point.key:44} {point.phase:8} {row["M"]:9.3g} {row["tokens"]:13,} {row["steps"]:7,} '
      f'{cost:9.3g} {cost / scale.flops_per_second:8,.0f}'
    )
  seconds = total['flops'] / scale.flops_per_second
  most = max(study.tokens(point, cfg) for point, cfg in points)
  lines += [
    '',
    f'sum: {total["tokens"]:,} tokens, {total["flops"]:.3g} FLOPs, {seconds / 3600:.2f} hours; the '
    f'longest point reads {most:,} tokens, so the text must have {most / scale.max_epochs:,.0f}',
  ]
  return '\n'.join(lines)


def write(out: pathlib.Path, scale: study.Scale, rows: Sequence[Mapping[str, Any]]):
  """Writes points.csv, optima.csv, the figures and report.md; returns their paths.

  Args:
    out: directory.
    scale: the study.
    rows: `study.row` with `trainer.Outcome` of every point.
  """
  out.mkdir(parents=True, exist_ok=True)
  found = analyse.analyse(rows, scale.band)
  tables = {'points.csv': rows, 'optima.csv': optima(found)}
  for name, table in tables.items():
    atomic_files.write_text(out / name, _csv(table))
  drawn = figures.draw(out, found)
  atomic_files.write_text(out / 'report.md', markdown(scale, rows, found))
  return [out / 'report.md', *(out / name for name in tables), *drawn]


_COLUMNS = (
  *('phase', 'kind', 'dial', 'budget', 'rate', 'rows', 'seed', 'embed_dim', 'num_layers'),
  *('M', 'N1', 'N2', 'parameters', 'steps', 'batch_tokens', 'tokens', 'compute'),
  *('loss', 'bits_per_byte', 'seconds'),
)


def read_points(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a points.csv, numbers as numbers.

  Raises:
    errors.InputError: it cannot be read, is no such table, or lacks a phase of the study.
  """
  try:
    with path.open(newline='', encoding='utf-8') as file:
      rows = list(csv.DictReader(file))
  except (OSError, UnicodeDecodeError) as e:
    raise errors.InputError(f'--points={path} cannot be read ({e}); name a points.csv') from e
  missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
  errors.require(
    not missing,
    f'--points={path} must be a table as this command writes it, and has no column '
    f'{", ".join(missing)}; name another one',
  )
  needed = [(phase, 'dense') for phase in ('hyper', 'noise')]
  needed += [(phase, kind) for phase in ('isoflop', 'heldout') for kind in study.KINDS]
  found = {(row['phase'], row['kind']) for row in rows}
  absent = [f'{phase} of {kind}' for phase, kind in needed if (phase, kind) not in found]
  errors.require(
    not absent,
    f'--points={path} has no points of {", ".join(absent)}, which the report needs; train these '
    'phases first, or name the table of a whole study',
  )
  return [{key: _number(value) for key, value in row.items()} for row in rows]


def _number(text: str) -> int | float | str:
  for kind in (int, float):
    with contextlib.suppress(ValueError):
      return kind(text)
  return text


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def optima(found: analyse.Analysis) -> list[dict[str, Any]]:
  """One row per family, measure and budget: the parabola, and why it may not count."""
  rows = []
  for kind, measures in found.measured.items():
    profiles = [(name, p) for name, one in measures.items() for p in one.profiles]
    profiles.append(('M', found.heldout[kind].profile))
    for name, profile in profiles:
      parabola = scaling_laws.fit_parabola(profile.sizes, profile.losses)
      rows.append(
        {
          'kind': kind,
          'measure': name,
          'budget': f'{profile.budget:.6g}',
          'held_out': profile is found.heldout[kind].profile,
          'sizes': len(profile.sizes),
          'x_opt': f'{parabola.minimum:.6g}',
          'D_opt': f'{profile.budget / parabola.minimum:.6g}',
          'lowest': f'{parabola.lowest:.6f}',
          'curvature': f'{parabola.curvature:.6g}',
          'problem': parabola.problem,
        }
      )
  return rows


def grade(interval: tuple[float, float], value: float) -> str:
  """What an interval says about a published number."""
  low, high = interval
  if not low <= value <= high:
    return 'differs from'
  return 'not distinguishable from'


def markdown(scale: study.Scale, rows: Sequence[Mapping[str, Any]], found: analyse.Analysis) -> str:
  """The whole report."""
  parts = [
    f'# Scaling laws, scale {scale.name}',
    'Written by the command; README.md beside `results` has question, method and reading.',
    '## Verdict',
    '\n'.join(f'- {line}' for line in verdict(found)),
    '## How it was made',
    _made(scale, rows),
    '## Hyper-parameters',
    _hyper_text(found.hyper),
    '![Loss over rate and batch, in per cent above the best; near-optimal points in orange, the '
    "surface's minimum as a cross](hyper_surfaces.png)",
    '![eta_opt and B_opt against C](hyper_laws.png)',
    '### What would decide the exponents',
    _power_text(found.hyper),
    '## IsoFLOP profiles',
    _profile_text(found),
    '![Loss against M at each budget; stars are minima that count](isoflop.png)',
    '![M_opt and D_opt against C, with bootstrap bands and the held-out budget](allocation.png)',
    '## Measures of model size',
    _measure_text(found),
    '![Lowest loss against C in each measure](loss_curves.png)',
  ]
  return '\n\n'.join(parts) + '\n'


def verdict(found: analyse.Analysis) -> list[str]:
  """One line per question."""
  lines = [
    _law_verdict(found.hyper, what, key, paper)
    for what, key, paper in (
      ('eta_opt', 'rate', study.PAPER.rate),
      ('B_opt', 'batch', study.PAPER.batch),
    )
  ]
  for kind in found.measured:
    lines += _verdict_of(found, kind)
  return lines


def _law_verdict(hyper: analyse.Hyper, what: str, key: str, paper: scaling_laws.PowerLaw) -> str:
  """The exponent of one law by the band or, where the grid cuts it off, by surfaces."""
  band = f'within {_share(hyper.wide.band)} of the best'
  cut = sum(key in grid.cut_off for grid in hyper.grids)
  others = {
    f'the points {band}': hyper.wide,
    f"the points within the paper's {_share(scaling_laws.NEAR_OPTIMAL)}": hyper.as_paper,
  }
  if hyper.surfaces is not None:
    others['the minima of surfaces'] = hyper.surfaces
  through = f'the points {band}' if not cut or hyper.surfaces is None else 'the minima of surfaces'
  law, bounds = _exponent(others.pop(through), key)
  beside = '; '.join(
    f'through {name} {_signed(*_exponent(laws, key))}' for name, laws in others.items()
  )
  text = (
    f'{what}(C): exponent {_signed(law, bounds)} through {through}; '
    f"{grade(bounds, paper.exponent)} the paper's {paper.exponent:.4f}, "
    f'{grade(bounds, 0)} 0, no dependence at all. '
  )
  if cut:
    text += (
      f'(Points {band} lie on an end of the grid at {cut} of {len(hyper.grids)} budgets, which '
      'as a rule draws an exponent through them towards 0.) '
    )
  return f'{text}Beside: {beside}.'


def _signed(law: float, bounds: tuple[float, float]) -> str:
  return f'{law:.3f}, {_PERCENT} % interval {_span(bounds)}'


def _exponent(laws: analyse.Laws, key: str) -> tuple[float, tuple[float, float]]:
  """Of eta_opt ('rate') or B_opt ('batch'), with its interval."""
  samples = {'rate': laws.rate_samples, 'batch': laws.batch_samples}[key]
  return getattr(laws.laws, key).exponent, scaling_laws.interval(samples[:, 1])


def _share(band: float) -> str:
  return f'{100 * band:g} %'


def _verdict_of(found: analyse.Analysis, kind: str) -> list[str]:
  one, held = found.measured[kind]['M'], found.heldout[kind]
  allocation, budget = one.allocation, held.profile.budget
  if allocation is None:
    return [f'{kind}: fewer than two budgets have a minimum among the sampled sizes; no M_opt(C).']
  used = sum(not p.problem for p in allocation.parabolas.values())
  bounds, paper = allocation.exponent_interval, study.PAPER_ALLOCATION.exponent
  lines = [
    f'{kind}: M_opt exponent {allocation.optimum.exponent:.3f}, {_PERCENT} % interval '
    f'{_span(bounds)}, from {used} of {len(allocation.parabolas)} budgets; '
    f"{grade(bounds, paper)} the paper's {paper}. D_opt has 1 minus that, by construction."
  ]
  predicted = float(allocation.optimum(budget))
  low, high = (float(end[0]) for end in allocation.band([budget]))
  text = (
    f'{kind}, held-out C = {budget:.3g}: M_opt predicted {predicted:.3g} ({low:.3g} to {high:.3g})'
  )
  if held.parabola.problem:
    text += f', not to be checked: {held.parabola.problem}'
  else:
    inside = 'inside' if low <= held.parabola.minimum <= high else 'outside of'
    text += (
      f', found {held.parabola.minimum:.3g}, {inside} the interval; the predicted size costs '
      f'{100 * held.regret / held.parabola.lowest:.2f} % of loss'
    )
  if one.prediction is not None:
    text += (
      f'. Lowest loss predicted {one.prediction:.4f}, best run {one.measured:.4f} '
      f'({100 * (one.prediction / one.measured - 1):+.2f} %)'
    )
  return [*lines, text + '.']


def _span(bounds: tuple[float, float]) -> str:
  return f'{bounds[0]:.3f} to {bounds[1]:.3f}'


def _made(scale: study.Scale, rows: Sequence[Mapping[str, Any]]) -> str:
  runs = {row['key']: row for row in rows}.values()
  seconds = sum(row['seconds'] for row in runs)
  versions = run_record.versions()
  git = run_record.git_state() or {'commit': 'unknown'}
  return (
    f'    python -m experiments.scaling_laws --scale={scale.name} --workdir=W\n\n'
    f'{len(runs)} runs, {sum(row["tokens"] for row in runs):,} tokens, '
    f'{sum(row["compute"] for row in runs):.3g} FLOPs (M D); {seconds / 60:.1f} minutes in '
    f'training steps, compiling and evaluating not counted, on {jax.devices()[0].device_kind}, '
    f'{platform.machine()}. Python {versions["python"]}, JAX {versions["jax"]}, Flax '
    f'{versions["flax"]}, Optax {versions["optax"]}; report from commit {git["commit"][:10]}. '
    'Every run is in points.csv, every parabola in optima.csv.'
  )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def _hyper_text(hyper: analyse.Hyper) -> str:
  lines, own, paper = [], _share(hyper.wide.band), _share(scaling_laws.NEAR_OPTIMAL)
  for grid in hyper.grids:
    surface = 'too few points'
    if grid.surface is not None:
      surface = grid.surface.problem or ''
    if grid.budget in hyper.minima:
      minimum = hyper.minima[grid.budget]
      surface = f'{minimum.a:.3g}, {minimum.b:,.0f}' + (f' ({surface})' if surface else '')
    lines.append(
      (
        f'{grid.budget:.3g}',
        f'{grid.rows[0]["M"]:.3g}',
        f'{grid.best["bits_per_byte"]:.4f}',
        f'{grid.best["rate"]:g}, {grid.best["batch_tokens"]:,}',
        grid.at_edge or '-',
        f'{len(grid.near)}, {grid.as_paper}',
        surface,
        f'{float(study.PAPER.rate(grid.budget)):.3g}, {float(study.PAPER.batch(grid.budget)):,.0f}',
      )
    )
  table = _table(
    (
      'C',
      'M',
      'best bpb',
      'its rate, batch',
      'at the edge',
      f'within {own}, {paper}',
      'surface minimum',
      "paper's formula",
    ),
    lines,
  )
  edges = sum(bool(grid.at_edge) for grid in hyper.grids)
  laws = hyper.wide.laws
  return (
    f'{table}\n\n'
    f'eta_opt = {laws.rate.coefficient:.4g} C^{laws.rate.exponent:.4f}, B_opt = '
    f'{laws.batch.coefficient:.4g} C^{laws.batch.exponent:.4f} tokens, through all points within '
    f'{own} of the best of their budget, each the mean of {hyper.seeds} seeds. '
    f'Seeds of one point scatter by {100 * hyper.noise:.2f} % (standard deviation, pooled over '
    f'{hyper.repeated} points within {_share(scaling_laws.REGION)} of their best), '
    f"so the paper's band of {paper} is "
    f'{"narrower" if hyper.noise > scaling_laws.NEAR_OPTIMAL else "wider"} than the luck of one '
    'seed; the intervals come from losses redrawn with the scatter of such means, near-optimal '
    'points chosen anew. '
    f'{edges} of {len(hyper.grids)} optima lie at an edge of the grid and are bounds, not values.'
    f'{_surface_text(hyper)}'
  )


def _surface_text(hyper: analyse.Hyper) -> str:
  if hyper.surfaces is None:
    return ''
  rate, batch = hyper.surfaces.laws.rate, hyper.surfaces.laws.batch
  return (
    f' Through the minima of the surfaces: eta_opt = {rate.coefficient:.4g} C^{rate.exponent:.4f}, '
    f'B_opt = {batch.coefficient:.4g} C^{batch.exponent:.4f}. A surface is a quadratic in '
    f'(ln rate, ln batch) through what is within {_share(scaling_laws.REGION)} of the best; minima '
    f'up to {scaling_laws.OUTSIDE:g} times beyond the grid count.'
  )


def _power_text(hyper: analyse.Hyper) -> str:
  """How many runs would tell the paper's exponents from 0, with this scatter and these surfaces."""
  surfaces = [grid.surface for grid in hyper.grids if grid.surface is not None]
  try:
    curvature = scaling_power.curvature(surfaces)
  except ValueError:
    return 'Not known: no grid has a surface with a minimum, which would say how losses rise.'
  rows = hyper.grids[0].rows
  grid = (len({row['rate'] for row in rows}), len({row['batch_tokens'] for row in rows}))
  paper = study.PAPER
  truth = scaling_power.Truth(
    paper.rate.exponent, paper.batch.exponent, curvature, hyper.noise, grid
  )
  table = _table(
    ['exponent', 'decades of C', *(f'band {100 * band:g} %' for band in _BANDS)],
    [
      [
        f'{name}, {exponent}',
        f'{decades:g}',
        *(_decides(truth, which, decades, band) for band in _BANDS),
      ]
      for which, name, exponent in (
        ('rate', 'eta_opt', paper.rate.exponent),
        ('batch', 'B_opt', paper.batch.exponent),
      )
      for decades in _DECADES
    ],
  )
  told = f'{scaling_power.POWER * scaling_power.STUDIES:.0f} of {scaling_power.STUDIES}'
  return (
    f'{table}\n\nThe fewest seeds per point of the grid whose {_PERCENT} % interval leaves out 0 '
    f"in {told} drawn studies, if the exponent is the paper's, "
    'with the scatter and the mean curvature found above, budgets a factor of 2 apart and one grid '
    f'that holds all optima; at most {scaling_power.REPEATS[-1]} seeds are tried.'
  )


def _decides(truth: scaling_power.Truth, which: str, decades: float, band: float) -> str:
  found = scaling_power.least(truth, which, decades, band=band)
  if found is None:
    return '-'
  return f'{found.repeats} ({found.runs:,} runs, power {found.power:.2f})'


def _profile_text(found: analyse.Analysis) -> str:
  lines = []
  for row in optima(found):
    if row['measure'] == 'M':
      lines.append(
        (
          row['kind'],
          row['budget'] + (' (held out)' if row['held_out'] else ''),
          row['sizes'],
          f'{float(row["x_opt"]):.3g}' if not row['problem'] else '-',
          f'{float(row["D_opt"]):.3g}' if not row['problem'] else '-',
          row['lowest'][:6] if not row['problem'] else '-',
          row['problem'] or '-',
        )
      )
  table = _table(
    ('family', 'C', 'models', 'M_opt', 'D_opt', 'lowest bpb', 'left out because'), lines
  )
  laws = []
  for kind, measures in found.measured.items():
    allocation = measures['M'].allocation
    if allocation is not None:
      laws.append(
        f'{kind}: M_opt = {allocation.optimum.coefficient:.4g} '
        f'C^{allocation.optimum.exponent:.4f}, D_opt = {allocation.tokens.coefficient:.4g} '
        f'C^{allocation.tokens.exponent:.4f}; '
        f'{100 * allocation.rejected:.1f} % of the redrawn profiles had no minimum among their '
        'sizes and dropped out.'
      )
  return table + '\n\n' + '\n'.join(laws)


def _measure_text(found: analyse.Analysis) -> str:
  lines = []
  for kind, measures in found.measured.items():
    for name, one in measures.items():
      exponent = span = error = '-'
      budgets = f'0 of {len(one.profiles)}'
      if one.allocation is not None:
        good = sum(not p.problem for p in one.allocation.parabolas.values())
        budgets = f'{good} of {len(one.profiles)}'
        exponent = f'{one.allocation.optimum.exponent:.3f}'
        span = _span(one.allocation.exponent_interval)
      if one.prediction is not None:
        error = f'{100 * (one.prediction / one.measured - 1):+.2f} %'
      lines.append((kind, name, budgets, exponent, span, error))
  table = _table(
    (
      'family',
      'x',
      'budgets',
      'exponent of x_opt',
      f'{_PERCENT} % interval',
      'predicted - best held-out loss',
    ),
    lines,
  )
  return (
    f"{table}\n\nC = x D. Runs were laid out in M; for 6N1 and 6N2 each model's loss is "
    'interpolated between its own runs, never beyond them, so fewer budgets remain. For MoE all '
    'three are activated quantities.'
  )
