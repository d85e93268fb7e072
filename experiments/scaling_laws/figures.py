"""The figures of the report."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure, ticker

from experiments.scaling_laws import analyse, study
from moe_jax.analysis import scaling_laws
from moe_jax.runs import plots

_GREY = '0.45'
_WORST_SHOWN = 5.0  # per cent above the best, where the colour of a grid saturates


def draw(out: pathlib.Path, found: analyse.Analysis) -> list[pathlib.Path]:
  """Draws all of them into `out` and returns their paths."""
  names = ('hyper_surfaces', 'hyper_laws', 'isoflop', 'allocation', 'loss_curves')
  paths = [out / f'{name}.png' for name in names]
  with matplotlib.rc_context(plots.STYLE):
    for function, path in zip((_surfaces, _laws, _isoflop, _allocation, _curves), paths):
      plots.save(function(found), path)
  return paths


def _log_axis(panel: Any):
  """Few enough numbers that they never overlap."""
  panel.set_xscale('log')
  panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
  panel.xaxis.set_minor_formatter(ticker.NullFormatter())


def _panels(rows: int, columns: int, width: float = 4.4, height: float = 3.6) -> Any:
  fig = figure.Figure(figsize=(width * columns, height * rows), layout='constrained')
  return fig, fig.subplots(rows, columns, squeeze=False)


def _surfaces(found: analyse.Analysis) -> figure.Figure:
  """Loss over rate and batch, in per cent above the best of the budget."""
  grids = found.hyper.grids
  fig, axes = _panels(1, len(grids), width=3.6)
  for panel, grid in zip(axes[0], grids):
    image = _surface(panel, grid, found.hyper.wide.band)
  axes[0][0].set_ylabel('batch [tokens]')
  bar = fig.colorbar(image, ax=list(axes[0]), pad=0.01, extend='max')
  bar.set_label('% above the best')
  bar.outline.set_visible(False)
  return fig


def _surface(panel: Any, grid: analyse.Grid, band: float) -> Any:
  rates, batches = (sorted({row[k] for row in grid.rows}) for k in ('rate', 'batch_tokens'))
  best = grid.best['bits_per_byte']
  above = np.zeros((len(batches), len(rates)))
  for row in grid.rows:
    at = batches.index(row['batch_tokens']), rates.index(row['rate'])
    above[at] = 100 * (row['bits_per_byte'] / best - 1)
  image = panel.imshow(above, origin='lower', cmap='viridis', vmin=0, vmax=_WORST_SHOWN)
  for (i, j), value in np.ndenumerate(above):
    near = value <= 100 * band
    style = {'weight': 'bold', 'bbox': {'facecolor': plots.ORANGE, 'linewidth': 0}} if near else {}
    panel.text(j, i, f'{value:.2f}', ha='center', va='center', color='white', fontsize=8, **style)
  if grid.surface is not None and not grid.surface.problem:
    place = [
      np.interp(np.log(x), np.log(ticks), range(len(ticks)))
      for x, ticks in ((grid.surface.a, rates), (grid.surface.b, batches))
    ]
    panel.plot(*place, 'x', color='white', markersize=11, markeredgewidth=2)
  panel.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates], rotation=45)
  panel.set_yticks(range(len(batches)), [f'{batch:,}' for batch in batches])
  panel.set_xlabel('peak learning rate')
  panel.set_title(f'C = {grid.budget:.3g} FLOPs, best {best:.3f} bpb', loc='left', fontsize=10)
  for spine in panel.spines.values():
    spine.set_visible(False)
  return image


def _laws(found: analyse.Analysis) -> figure.Figure:
  """Rate and batch against the budget, with the paper's formula."""
  hyper, wide = found.hyper, found.hyper.wide
  fig, axes = _panels(1, 2, width=5.2, height=4)
  kinds = (
    ('rate', 'rate', 'peak learning rate', 'a', wide.rate_samples),
    ('batch_tokens', 'batch', 'batch [tokens]', 'b', wide.batch_samples),
  )
  within = f'within {100 * wide.band:g} % of the best'
  for panel, (key, law_name, label, name, samples) in zip(axes[0], kinds):
    law, paper = getattr(wide.laws, law_name), getattr(study.PAPER, law_name)
    budgets = [grid.budget for grid in hyper.grids]
    line = np.geomspace(min(budgets) / 1.5, max(budgets) * 1.5)
    panel.fill_between(line, *scaling_laws.law_band(samples, line), color=plots.BLUE, alpha=0.15)
    panel.plot(line, law(line), color=plots.BLUE, label=f'fit, exponent {law.exponent:.2f}')
    panel.plot(line, paper(line), '--', color=_GREY, label=f"paper's, {paper.exponent:.3f}")
    near = [(row['budget'], row[key]) for grid in hyper.grids for row in grid.near]
    panel.plot(*zip(*near), 'o', color=plots.BLUE, alpha=0.6, label=within)
    best = [(grid.budget, grid.best[key]) for grid in hyper.grids]
    panel.plot(
      *zip(*best), 'o', markersize=11, markerfacecolor='none', color=plots.ORANGE, label='best'
    )
    if hyper.surfaces is not None:
      through = getattr(hyper.surfaces.laws, law_name)
      text = f'fit of the minima, {through.exponent:.2f}'
      panel.plot(line, through(line), ':', color='black', label=text)
    minima = [getattr(surface, name) for surface in hyper.minima.values()]
    panel.plot(list(hyper.minima), minima, 'x', color='black', label='minimum of the surface')
    _log_log(panel, 'C [FLOPs]', label)
    panel.legend(frameon=False, fontsize=8)
  return fig


def _log_log(panel: Any, x: str, y: str):
  _log_axis(panel)
  panel.set_yscale('log')
  panel.set_xlabel(x)
  panel.set_ylabel(y)
  panel.grid(True)


def _colours(number: int) -> Sequence[Any]:
  return matplotlib.colormaps['viridis'](np.linspace(0, 0.85, number))


def _isoflop(found: analyse.Analysis) -> figure.Figure:
  """Loss against M at each budget, with its parabola and its minimum."""
  kinds = list(found.measured)
  fig, axes = _panels(1, len(kinds), width=5.8, height=4.8)
  for panel, kind in zip(axes[0], kinds):
    profiles = found.measured[kind]['M'].profiles
    parabolas = [scaling_laws.fit_parabola(p.sizes, p.losses) for p in profiles]
    for profile, parabola, colour in zip(profiles, parabolas, _colours(len(profiles))):
      _profile(panel, profile, parabola, colour, f'{profile.budget:.3g}')
    held = found.heldout[kind]
    _profile(
      panel, held.profile, held.parabola, plots.ORANGE, f'{held.profile.budget:.3g}, held out'
    )
    _log_axis(panel)
    panel.set_xlabel('M, non-embedding FLOPs per token' + (' (activated)' * (kind == 'moe')))
    panel.set_ylabel('held-out bits per byte')
    panel.set_title(kind, loc='left')
    panel.grid(True)
    panel.legend(frameon=False, fontsize=8, title='C [FLOPs]')
  return fig


def _profile(
  panel: Any,
  profile: scaling_laws.Profile,
  parabola: scaling_laws.Parabola,
  colour: Any,
  label: str,
):
  line = np.geomspace(profile.sizes.min(), profile.sizes.max())
  panel.plot(profile.sizes, profile.losses, 'o', color=colour, markersize=4)
  panel.plot(line, parabola(line), color=colour, linewidth=1.2, label=label)
  if not parabola.problem:
    panel.plot(
      parabola.minimum, parabola.lowest, '*', color=colour, markersize=12, markeredgecolor='black'
    )


def _allocation(found: analyse.Analysis) -> figure.Figure:
  """M_opt and D_opt against the budget."""
  kinds = list(found.measured)
  fig, axes = _panels(len(kinds), 2, width=5.2, height=3.8)
  for panels, kind in zip(axes, kinds):
    allocation, held = found.measured[kind]['M'].allocation, found.heldout[kind]
    parabolas = {
      p.budget: scaling_laws.fit_parabola(p.sizes, p.losses)
      for p in found.measured[kind]['M'].profiles
    }
    budgets = [*parabolas, held.profile.budget]
    line = np.geomspace(min(budgets) / 1.3, max(budgets) * 1.3)
    for panel, tokens in zip(panels, (False, True)):
      turn = (lambda c, x: c / x) if tokens else (lambda c, x: x)
      panel.plot(
        line,
        turn(line, study.PAPER_ALLOCATION(line)),
        '--',
        color=_GREY,
        label="paper's formula, extrapolated down",
      )
      if allocation is not None:
        low, high = allocation.band(line)
        panel.fill_between(line, turn(line, low), turn(line, high), color=plots.BLUE, alpha=0.15)
        law = allocation.tokens if tokens else allocation.optimum
        panel.plot(
          line, law(line), color=plots.BLUE, label=f'fit, exponent {law.exponent:.2f}, 5-95 % band'
        )
      good = [(b, turn(b, p.minimum)) for b, p in parabolas.items() if not p.problem]
      if good:
        panel.plot(*zip(*good), 'o', color=plots.BLUE, label='minimum of a profile')
      if not held.parabola.problem:
        c = held.profile.budget
        panel.plot(
          c,
          turn(c, held.parabola.minimum),
          '*',
          color=plots.ORANGE,
          markersize=13,
          label='held-out budget',
        )
      _log_log(panel, 'C [FLOPs]', 'D_opt [tokens]' if tokens else 'M_opt [FLOPs per token]')
      panel.set_title(kind, loc='left')
      panel.legend(frameon=False, fontsize=8)
  return fig


def _curves(found: analyse.Analysis) -> figure.Figure:
  """Lowest loss against C in each measure of model size."""
  kinds, measures = list(found.measured), list(analyse.MEASURES)
  fig, axes = _panels(len(kinds), len(measures), width=4.2, height=3.4)
  for panels, kind in zip(axes, kinds):
    for panel, name in zip(panels, measures):
      one = found.measured[kind][name]
      if one.allocation is not None:
        good = [(b, p.lowest) for b, p in one.allocation.parabolas.items() if not p.problem]
        panel.plot(*zip(*good), 'o', color=plots.BLUE, label='minimum of a profile')
      if one.curve is not None:
        line = np.geomspace(min(b for b, _ in good), one.prediction_budget * 1.2)
        panel.plot(line, one.curve(line), color=plots.BLUE, label='fit')
      panel.plot(
        one.prediction_budget,
        one.measured,
        '*',
        color=plots.ORANGE,
        markersize=13,
        label='best held-out run',
      )
      _log_axis(panel)
      panel.set_xlabel(f'C = {name} D [FLOPs]')
      panel.set_ylabel('held-out bits per byte')
      panel.set_title(kind, loc='left')
      panel.grid(True)
      panel.legend(frameon=False, fontsize=8)
  return fig
