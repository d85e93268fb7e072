"""From the rows of a study to its fits; `study.row` says what a row holds."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.scaling_laws import study
from moe_jax.analysis import scaling_laws

MEASURES = {'M': 1, '6N1': 6, '6N2': 6}
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
  """Batch and rate at one budget."""

  budget: float
  rows: list[Row]
  best: Row
  near: list[Row]  # within the study's band, the best included
  as_paper: int  # how many are within the paper's
  at_edge: str  # '' or which of 'rate', 'batch' is best at an end of the grid
  cut_off: frozenset[str]  # of these, the ones that have a near-optimal point at an end
  surface: scaling_laws.Surface | None  # (rate, batch tokens); None with too few points


@dataclasses.dataclass(frozen=True)
class Laws:
  """Eq. 1 through the points within a band of the best, with redrawn losses beside.

  Of surfaces: through their minima, and the band is that of the points they are fitted to.
  """

  band: float
  laws: study.Laws
  rate_samples: np.ndarray  # [S, 2]
  batch_samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Hyper:
  """Phases hyper and noise."""

  grids: list[Grid]
  wide: Laws  # of the study's own band, which decides how the profiles are trained
  as_paper: Laws  # of the paper's
  surfaces: Laws | None  # None: too few of them have a minimum
  minima: Mapping[float, scaling_laws.Surface]  # that those go through, by budget
  noise: float  # standard deviation between seeds over mean
  repeated: int  # points that it was measured at
  seeds: int  # of every point of the grid


@dataclasses.dataclass(frozen=True)
class Measured:
  """IsoFLOP profiles of one family in one measure of model size."""

  profiles: list[scaling_laws.Profile]
  allocation: scaling_laws.Allocation | None  # None if too few budgets have a minimum
  curve: scaling_laws.LossCurve | None  # of the budgets that have one, at least three
  prediction: float | None  # of the lowest loss of a held-out run, from its C in this measure
  prediction_budget: float  # that C
  measured: float  # that loss


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """The larger budget that no fit has seen."""

  profile: scaling_laws.Profile
  parabola: scaling_laws.Parabola
  regret: float | None  # loss at the predicted size - lowest, by the held-out parabola


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Everything that the report says."""

  hyper: Hyper
  measured: dict[str, dict[str, Measured]]  # by family and measure
  heldout: dict[str, HeldOut]  # by family


def analyse(rows: Sequence[Row], band: float) -> Analysis:
  """Fits everything; the laws of rate and batch go through what is within `band` of the best."""

  def of(phase, kind):
    return [r for r in rows if r['phase'] == phase and r['kind'] == kind]

  measured, heldout = {}, {}
  for kind in study.KINDS:
    isoflop, unseen = of('isoflop', kind), of('heldout', kind)
    measured[kind] = {name: _measured(name, isoflop, unseen) for name in MEASURES}
    heldout[kind] = _held_out(unseen, measured[kind]['M'].allocation)
  hyper = _hyper(of('hyper', 'dense'), of('noise', 'dense'), band)
  return Analysis(hyper, measured, heldout)


def _hyper(rows: Sequence[Row], repeats: Sequence[Row], band: float) -> Hyper:
  noise, repeated = scatter([*rows, *repeats])
  means = study.seed_means(rows)
  seeds = len(rows) // len(means)
  grids = [_grid(budget, group, band) for budget, group in study.by_budget(means).items()]

  keys = ('budget', 'rate', 'batch_tokens', 'bits_per_byte')
  columns = [[row[key] for row in means] for key in keys]

  def laws(band: float) -> Laws:
    return _band_laws(means, band, noise / math.sqrt(seeds))

  return Hyper(
    grids,
    laws(band),
    laws(scaling_laws.NEAR_OPTIMAL),
    _surface_laws(columns, noise / math.sqrt(seeds)),
    scaling_laws.surface_minima(*columns),
    noise,
    repeated,
    seeds,
  )


def scatter(rows: Sequence[Row]) -> tuple[float, int]:
  """The standard deviation between seeds over the mean, and the number of points it is pooled over.

  Points far from the best of their budget are left out: where rates are too high, seeds scatter
  more than where the laws look. Where no point near the best was repeated, all that were count.
  """
  points = {}
  for row in {row['key']: row for row in rows}.values():  # a point may be of two phases
    point = (row['budget'], row['rate'], row['batch_tokens'])
    points.setdefault(point, []).append(row['bits_per_byte'])
  means = {point: statistics.fmean(losses) for point, losses in points.items()}
  best = {}
  for (budget, *_), mean in means.items():
    best[budget] = np.fmin(mean, best.get(budget, mean))  # not of one that diverged
  repeated = [point for point, losses in points.items() if len(losses) > 1]
  near = [p for p in repeated if means[p] <= (1 + scaling_laws.REGION) * best[p[0]]]
  near = near or [p for p in repeated if math.isfinite(means[p])]
  squares = sum((loss / means[point] - 1) ** 2 for point in near for loss in points[point])
  return math.sqrt(squares / sum(len(points[point]) - 1 for point in near)), len(near)


def _band_laws(means: Sequence[Row], band: float, noise: float) -> Laws:
  budgets, losses = ([row[key] for row in means] for key in ('budget', 'bits_per_byte'))
  samples = [
    scaling_laws.bootstrap_near_optimal(
      budgets, [row[name] for row in means], losses, noise, band=band
    )
    for name in ('rate', 'batch_tokens')
  ]
  return Laws(band, study.fit_laws(means, band), *samples)


def _surface_laws(columns: Sequence[Sequence[float]], noise: float) -> Laws | None:
  try:
    laws = study.Laws(*scaling_laws.fit_surface_laws(*columns))
    samples = scaling_laws.bootstrap_surface_laws(*columns, noise)
  except ValueError:
    return None
  return Laws(scaling_laws.REGION, laws, *samples)


def _best(rows: Sequence[Row]) -> Row:
  """The run of the lowest loss; one that diverged has none."""
  finite = [row for row in rows if np.isfinite(row['bits_per_byte'])]
  return min(finite or rows, key=lambda row: row['bits_per_byte'])


def _grid(budget: float, rows: list[Row], band: float) -> Grid:
  best, near = _best(rows), study.near_optimal_rows(rows, band)
  columns = {'rate': 'rate', 'batch': 'batch_tokens'}
  ends = {
    name: {pick(row[key] for row in rows) for pick in (min, max)} for name, key in columns.items()
  }
  at_edge = [name for name, key in columns.items() if best[key] in ends[name]]
  cut_off = {name for name, key in columns.items() if ends[name] & {row[key] for row in near}}
  inside = [
    r for r in rows if r['bits_per_byte'] <= (1 + scaling_laws.REGION) * best['bits_per_byte']
  ]
  surface = None
  if len(inside) > 6:
    surface = scaling_laws.fit_surface(
      *([row[key] for row in inside] for key in ('rate', 'batch_tokens', 'bits_per_byte'))
    )
  as_paper = len(study.near_optimal_rows(rows, scaling_laws.NEAR_OPTIMAL))
  edges = ' and '.join(at_edge)
  return Grid(budget, rows, best, near, as_paper, edges, frozenset(cut_off), surface)


def _size(row: Row, measure: str) -> float:
  return MEASURES[measure] * row[measure.removeprefix('6')]


def profiles(rows: Sequence[Row]) -> list[scaling_laws.Profile]:
  """One per budget, sizes in M as they were trained."""
  found = []
  for budget, group in study.by_budget(rows).items():
    group = sorted(group, key=lambda row: row['M'])
    sizes, losses = (np.array([row[key] for row in group]) for key in ('M', 'bits_per_byte'))
    found.append(scaling_laws.Profile(budget, sizes, losses))
  return found


def _resized(rows: Sequence[Row], measure: str) -> list[scaling_laws.Profile]:
  """Profiles in another measure, at as many budgets, shifted by the mean ratio to M."""
  models = {}
  for row in sorted(rows, key=lambda row: row['tokens']):
    models.setdefault(str(row['dial']), []).append(row)
  ratios = [_size(group[0], measure) / group[0]['M'] for group in models.values()]
  shift = float(np.exp(np.mean(np.log(ratios))))
  return scaling_laws.resize_profiles(
    {name: np.array([row['tokens'] for row in group]) for name, group in models.items()},
    {name: np.array([row['bits_per_byte'] for row in group]) for name, group in models.items()},
    {name: _size(group[0], measure) for name, group in models.items()},
    [shift * budget for budget in study.by_budget(rows)],
  )


def _measured(measure: str, rows: Sequence[Row], unseen: Sequence[Row]) -> Measured:
  found = profiles(rows) if measure == 'M' else _resized(rows, measure)
  try:
    allocation = scaling_laws.fit_allocation(found)
  except ValueError:  # too few budgets with a minimum; the report lists them
    allocation = None
  curve = None
  if allocation is not None:
    good = {b: p.lowest for b, p in allocation.parabolas.items() if not p.problem}
    curve = scaling_laws.fit_loss_curve(*zip(*good.items())) if len(good) >= 3 else None
  best = _best(unseen)
  budget = _size(best, measure) * best['tokens']
  prediction = None if curve is None else float(curve(budget))
  return Measured(found, allocation, curve, prediction, budget, best['bits_per_byte'])


def _held_out(rows: Sequence[Row], allocation: scaling_laws.Allocation | None) -> HeldOut:
  profile = profiles(rows)[0]
  parabola = scaling_laws.fit_parabola(profile.sizes, profile.losses)
  regret = None
  if allocation is not None and not parabola.problem:
    regret = float(parabola(allocation.optimum(profile.budget)) - parabola.lowest)
  return HeldOut(profile, parabola, regret)
