"""Fits of scaling laws: pure functions of numpy arrays (DeepSeek LLM, arXiv 2401.02954, section 3).

* Hyper-parameters: of a grid over batch and rate at each budget, the near-optimal points (within
  0.25 % of the best loss) give power laws eta_opt(C) and B_opt(C) (Eq. 1). Where such points lie on
  an end of the grid, those beyond it are missing, which draws the exponent towards 0. So the minima
  of quadratic surfaces through the grid are the second opinion.
* IsoFLOP profiles: at each budget a parabola of the loss in ln x, x the model's FLOPs per token;
  its minimum is x_opt, D_opt = C / x_opt, and both are power laws of C (Eq. 3-4). Hence the
  exponents of x_opt and D_opt add up to 1 by construction, whatever the data: only one is measured.
* A minimum that lies outside of the sampled sizes, or a parabola that opens downwards, is no
  observation. It is reported with its reason and never enters a fit.
* Intervals come from a bootstrap over residuals: each profile is redrawn around its parabola, and
  parabolas and power law are fitted anew. They hold what scatter there is around the parabolas, not
  what all points have in common (one seed, one corpus, hyper-parameters that are off).

Symbols of the papers: C budget in FLOPs, D tokens, x FLOPs per token of a model in some measure
(M, 6 N1 or 6 N2).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

NEAR_OPTIMAL = 0.0025  # of the best loss: the paper's band
REGION = 0.05  # above the best loss, in which a surface is fitted: it knows nothing of divergence
OUTSIDE = 2.0  # factor by which a surface's minimum may lie beyond the grid
MIN_POINTS = 4  # of a profile: a parabola through three has no residuals
QUANTILES = (0.05, 0.95)  # of every interval
NO_SLOPE = 1e-9  # of logarithms of equal values, which rounding leaves a little off 0


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = coefficient * x^exponent."""

  coefficient: float
  exponent: float

  def __call__(self, x):
    """[...] -> [...]"""
    return self.coefficient * np.asarray(x, float) ** self.exponent


@dataclasses.dataclass(frozen=True)
class Parabola:
  """loss = lowest + curvature (ln x - ln minimum)^2 over the sampled sizes."""

  minimum: float  # x at which the loss is lowest (highest, if it opens downwards)
  lowest: float
  curvature: float
  low: float  # smallest sampled x
  high: float  # largest
  residuals: np.ndarray  # [n], loss - parabola

  def __call__(self, x):
    """[...] -> [...]"""
    return self.lowest + self.curvature * np.log(np.asarray(x, float) / self.minimum) ** 2

  @property
  def problem(self) -> str:
    """Why the minimum is no observation; '' if it is one."""
    if np.isnan(self.curvature):
      return 'a loss is not finite'
    if not self.curvature > 0:
      return 'no minimum: the parabola opens downwards'
    if self.minimum < self.low:
      return 'minimum below the smallest model'
    if self.minimum > self.high:
      return 'minimum above the largest model'
    return ''


@dataclasses.dataclass(frozen=True)
class Profile:
  """The runs of one budget."""

  budget: float  # C
  sizes: np.ndarray  # [n], x
  losses: np.ndarray  # [n]


@dataclasses.dataclass(frozen=True)
class Allocation:
  """How a budget is best divided into model and tokens, and how well that is known."""

  optimum: PowerLaw  # x_opt(C); D_opt(C) = C / x_opt(C)
  parabolas: Mapping[float, Parabola]  # by budget, also those that were left out
  samples: np.ndarray  # [samples, 2] ln coefficient and exponent of x_opt, refitted
  rejected: float  # share of the redrawn budgets that had no minimum among the sampled sizes

  @property
  def tokens(self) -> PowerLaw:
    """D_opt(C)."""
    return PowerLaw(1 / self.optimum.coefficient, 1 - self.optimum.exponent)

  @property
  def exponent_interval(self) -> tuple[float, float]:
    """Of x_opt; that of D_opt is 1 minus it, the ends swapped."""
    return interval(self.samples[:, 1])

  def band(self, budgets) -> tuple[np.ndarray, np.ndarray]:
    """[n] -> interval of x_opt at these budgets, two arrays [n]."""
    return law_band(self.samples, budgets)


@dataclasses.dataclass(frozen=True)
class LossCurve:
  """Lowest loss of a budget: floor + coefficient * C^-decay."""

  floor: float
  coefficient: float
  decay: float

  def __call__(self, budget):
    """[...] -> [...]"""
    return self.floor + self.coefficient * np.asarray(budget, float) ** -self.decay


def interval(values: np.ndarray) -> tuple[float, float]:
  """The `QUANTILES` of a sample; (nan, nan) of an empty one."""
  if not len(values):
    return float('nan'), float('nan')
  low, high = np.quantile(values, QUANTILES)
  return float(low), float(high)


def law_band(samples: np.ndarray, x) -> tuple[np.ndarray, np.ndarray]:
  """Interval of redrawn power laws [samples, 2] (ln coefficient, exponent) at each of x [n]."""
  values = np.exp(samples[:, :1] + samples[:, 1:] * np.log(np.asarray(x, float)))
  low, high = np.quantile(values, QUANTILES, axis=0)
  return low, high


def fit_power_law(x, y) -> PowerLaw:
  """Least squares of ln y in ln x, both [n] and positive.

  Raises:
    ValueError: fewer than two different x, which leave the exponent open.
  """
  slope, offset = _line(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)))
  return PowerLaw(float(np.exp(offset)), float(slope))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """Slope and offset of the least-squares line through [n] points."""
  if len(np.unique(x)) < 2:
    raise ValueError(f'an exponent needs two different x, not {np.exp(np.unique(x))}')
  slope, offset = np.polyfit(x, y, 1)
  return (slope, offset) if abs(slope) >= NO_SLOPE else (0.0, y.mean())


# Hyper-parameters


def near_optimal(losses, band: float = NEAR_OPTIMAL) -> np.ndarray:
  """[n] -> [n] bool, the finite losses of at most (1 + band) times the lowest."""
  losses = np.asarray(losses, float)
  return losses <= (1 + band) * np.nanmin(losses)


@dataclasses.dataclass(frozen=True)
class Surface:
  """The quadratic of a loss in (ln a, ln b): its lowest point, and whether it is one."""

  a: float
  b: float
  lowest: float
  problem: str  # why the point is no observation; '' if it is one
  coefficients: np.ndarray  # [6] of 1, u, v, u^2, u v, v^2 for u = ln a, v = ln b
  residuals: np.ndarray  # [n], loss - surface

  def __call__(self, a, b):
    """[...], [...] -> [...]"""
    return _quadratic(np.log(np.asarray(a, float)), np.log(np.asarray(b, float))) @ (
      self.coefficients
    )


def _quadratic(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """[...], [...] -> [..., 6], the terms of a quadratic."""
  return np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=-1)


def fit_surface(a, b, losses) -> Surface:
  """Least squares of a quadratic in (ln a, ln b) through [n] points, n > 6."""
  u, v = (np.log(np.asarray(x, float)) for x in (a, b))
  losses = np.asarray(losses, float)
  if len(losses) <= 6:
    raise ValueError(f'a quadratic surface needs more than 6 points, not {len(losses)}')
  terms = _quadratic(u, v)
  c = np.linalg.lstsq(terms, losses, rcond=None)[0]
  hessian = np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
  point = np.linalg.lstsq(hessian, -c[1:3], rcond=None)[0]
  problem = ''
  if np.linalg.eigvalsh(hessian)[0] <= 0:
    problem = 'no minimum: the surface is a saddle'
  elif not all(x.min() <= p <= x.max() for x, p in zip((u, v), point)):
    problem = 'minimum outside of the grid'
  lowest = float((_quadratic(*point[:, None]) @ c)[0])
  with np.errstate(over='ignore'):  # of an almost flat one
    a, b = np.exp(point).tolist()
  return Surface(a, b, lowest, problem, c, losses - terms @ c)


def bootstrap_near_optimal(
  budgets,
  values,
  losses,
  noise: float,
  *,
  band: float = NEAR_OPTIMAL,
  samples: int = 1000,
  seed: int = 0,
) -> np.ndarray:
  """Refits the power law of the near-optimal points to redrawn losses.

  Every loss is redrawn with the scatter between seeds, the near-optimal points are chosen anew and
  the law refitted: where the band is narrower than the scatter, the choice is luck, and the
  interval shows it.

  Args:
    budgets: [n], C of each point of the grid.
    values: [n], its rate or its batch.
    losses: [n].
    noise: standard deviation between seeds, as a share of the loss.
    band: see `near_optimal`.
    samples: S.
    seed: of the draws.

  Returns:
    [samples, 2], ln coefficient and exponent.

  Raises:
    ValueError: a single budget, which leaves the exponent open.
  """
  budgets, losses = np.asarray(budgets, float), np.asarray(losses, float)
  different = np.unique(budgets)
  if len(different) < 2:
    raise ValueError(f'an exponent needs two different budgets, not {different}')
  draws = np.random.default_rng(seed).standard_normal((samples, len(losses)))
  redrawn = losses * (1 + noise * draws)
  chosen = np.zeros(redrawn.shape)
  for group in (budgets == budget for budget in different):
    lowest = np.nanmin(redrawn[:, group], axis=1, keepdims=True)
    chosen[:, group] = redrawn[:, group] <= (1 + band) * lowest
  values = np.broadcast_to(np.asarray(values, float), redrawn.shape)
  return _power_laws(budgets, values, chosen)


def _power_laws(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """`fit_power_law` of every sample at once, each through its chosen points.

  Args:
    x: [n].
    y: [samples, n], 1 where it is not chosen and has no value.
    chosen: [samples, n], at least two different x of each sample.

  Returns:
    [samples, 2], ln coefficient and exponent.
  """
  x, y = np.log(x), np.log(y)
  centre, share = x.mean(), chosen / chosen.sum(axis=1, keepdims=True)
  x = x - centre
  mean_x, mean_y = share @ x, (share * y).sum(axis=1)
  slope = ((share * y) @ x - mean_x * mean_y) / (share @ (x * x) - mean_x**2)
  slope = np.where(np.abs(slope) < NO_SLOPE, 0.0, slope)
  return np.stack([mean_y - slope * (mean_x + centre), slope], axis=1)


def surface_minima(budgets, a, b, losses) -> dict[float, Surface]:
  """The surfaces by budget that have a minimum near the grid, which is given as [n] points.

  Each goes through the points within `REGION` of the lowest loss of its budget. A minimum up to
  `OUTSIDE` times beyond the grid counts: without those just beyond an end, the others would be
  drawn away from it.
  """
  budgets, a, b, losses = (np.asarray(x, float) for x in (budgets, a, b, losses))
  found = {}
  for budget in np.unique(budgets):
    own = budgets == budget
    own &= losses <= (1 + REGION) * np.nanmin(losses[own])
    if own.sum() <= 6:
      continue
    surface = fit_surface(a[own], b[own], losses[own])
    near = all(
      x.min() / OUTSIDE <= point <= OUTSIDE * x.max()
      for x, point in ((a, surface.a), (b, surface.b))
    )
    if near and not surface.problem.startswith('no minimum'):
      found[float(budget)] = surface
  return found


def fit_surface_laws(budgets, a, b, losses) -> tuple[PowerLaw, PowerLaw]:
  """The power laws in C of both coordinates of `surface_minima`.

  Raises:
    ValueError: fewer than three budgets have one.
  """
  minima = surface_minima(budgets, a, b, losses)
  if len(minima) < 3:
    raise ValueError(f'laws of surfaces need three budgets with a minimum, not {len(minima)}')
  return (
    fit_power_law(list(minima), [surface.a for surface in minima.values()]),
    fit_power_law(list(minima), [surface.b for surface in minima.values()]),
  )


def bootstrap_surface_laws(
  budgets, a, b, losses, noise: float, *, samples: int = 400, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Refits `fit_surface_laws` to redrawn losses, as `bootstrap_near_optimal` does its law.

  Args:
    budgets: [n], C of each point of the grid.
    a: [n], one coordinate.
    b: [n], the other.
    losses: [n].
    noise: standard deviation between seeds, as a share of the loss.
    samples: how many are drawn.
    seed: of the draws.

  Returns:
    Two arrays [at most samples, 2] of (ln coefficient, exponent), of a and b; draws that leave
    fewer than three budgets are dropped.

  Raises:
    ValueError: all are.
  """
  losses, laws = np.asarray(losses, float), []
  for draw in np.random.default_rng(seed).standard_normal((samples, len(losses))):
    try:
      laws.append(fit_surface_laws(budgets, a, b, losses * (1 + noise * draw)))
    except ValueError:
      continue
  if not laws:
    raise ValueError('no draw has three budgets with a minimum')
  one, other = (
    np.array([(np.log(law.coefficient), law.exponent) for law in side]) for side in zip(*laws)
  )
  return one, other


def _widened(residuals: np.ndarray, parameters: int) -> np.ndarray:
  """Residuals as large as the errors they come from: a fit takes up `parameters` of n.

  `MIN_POINTS` leaves every parabola one free.
  """
  return residuals * np.sqrt(len(residuals) / (len(residuals) - parameters))


# IsoFLOP profiles


def fit_parabola(sizes, losses) -> Parabola:
  """Least squares of a parabola of the loss in ln x.

  Raises:
    ValueError: fewer than `MIN_POINTS` sizes.
  """
  sizes, losses = np.asarray(sizes, float), np.asarray(losses, float)
  if len(sizes) < MIN_POINTS:
    raise ValueError(f'a profile needs {MIN_POINTS} sizes, not {len(sizes)}')
  centre = np.log(sizes).mean()  # keeps the three columns well apart
  u = np.log(sizes) - centre
  curvature, slope, offset = np.polyfit(u, losses, 2)
  vertex = -slope / (2 * curvature) if curvature else np.inf
  residuals = losses - np.polyval([curvature, slope, offset], u)
  with np.errstate(over='ignore'):
    minimum = float(np.exp(vertex + centre))
  lowest = float(offset - slope**2 / (4 * curvature)) if curvature else -np.inf
  return Parabola(
    minimum, lowest, float(curvature), float(sizes.min()), float(sizes.max()), residuals
  )


def fit_allocation(
  profiles: Sequence[Profile], *, samples: int = 1000, seed: int = 0
) -> Allocation:
  """x_opt(C) from the profiles whose minimum lies among their sizes.

  A redrawn profile without such a minimum drops out of its sample (and is counted); a sample with
  fewer than two budgets left is no sample.

  Args:
    profiles: one per budget.
    samples: how many times everything is redrawn.
    seed: of the draws.

  Raises:
    ValueError: fewer than two profiles have a minimum.
  """
  parabolas = {p.budget: fit_parabola(p.sizes, p.losses) for p in profiles}
  used = [p for p in profiles if not parabolas[p.budget].problem]
  if len(used) < 2:
    reasons = {f'{budget:.3g}': p.problem for budget, p in parabolas.items()}
    raise ValueError(f'x_opt(C) needs two budgets with a minimum; problems: {reasons}')
  optimum = fit_power_law([p.budget for p in used], [parabolas[p.budget].minimum for p in used])
  # Budgets have similar scatter and few points each, so that they lend each other residuals.
  pool = np.concatenate([_widened(parabolas[p.budget].residuals, 3) for p in used])
  drawn = np.random.default_rng(seed).choice(pool, (samples, sum(len(p.sizes) for p in used)))
  minima = np.empty((samples, len(used)))
  for i, (p, noise) in enumerate(zip(used, _parts(drawn, [len(p.sizes) for p in used]))):
    minima[:, i] = _minima(p.sizes, parabolas[p.budget](p.sizes) + noise)
  there = np.isfinite(minima)
  enough = there.sum(axis=1) >= 2
  budgets, points = np.array([p.budget for p in used]), np.where(there, minima, 1.0)
  laws = _power_laws(budgets, points[enough], there[enough])
  return Allocation(optimum, parabolas, laws, 1 - float(there.mean()))


def _parts(drawn: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
  """[samples, sum of the widths] -> an array [samples, width] for each."""
  return np.split(drawn, np.cumsum(widths)[:-1], axis=1)


def _minima(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
  """`fit_parabola` of every sample at once: [samples, n] losses at [n] sizes -> [samples].

  nan where the parabola has no minimum among the sizes, its `Parabola.problem`.
  """
  log_sizes = np.log(np.asarray(sizes, float))
  u = log_sizes - log_sizes.mean()
  curvature, slope, _ = np.polyfit(u, losses.T, 2)
  with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
    vertex = -slope / (2 * curvature)
    there = (curvature > 0) & (vertex >= u.min()) & (vertex <= u.max())
    return np.where(there, np.exp(vertex + log_sizes.mean()), np.nan)


def fit_loss_curve(budgets, losses) -> LossCurve:
  """Least squares of floor + coefficient * C^-decay through [n] points, n >= 3.

  For each of many floors between 0 and the lowest loss the rest is a line in logarithms; the floor
  with the smallest squared error of the loss itself wins. A floor of 0 is a power law.
  """
  budgets, losses = np.asarray(budgets, float), np.asarray(losses, float)
  if len(np.unique(budgets)) < 3:
    raise ValueError('three numbers need three budgets')

  def at(floor: float) -> LossCurve:
    law = fit_power_law(budgets, losses - floor)
    return LossCurve(float(floor), law.coefficient, -law.exponent)

  curves = [at(floor) for floor in losses.min() * np.linspace(0, 0.999, 1000)]
  return min(curves, key=lambda curve: float(((curve(budgets) - losses) ** 2).sum()))


def resize_profiles(
  tokens: Mapping[str, np.ndarray],
  losses: Mapping[str, np.ndarray],
  measure: Mapping[str, float],
  budgets: Sequence[float],
) -> list[Profile]:
  """IsoFLOP profiles in another measure of model size, from runs that were laid out in M.

  C = x D differs between runs of equal M D, so each model's loss is interpolated, ln L in ln D,
  between its own runs; never beyond them. Budgets with fewer than `MIN_POINTS` models are left out.

  Args:
    tokens: by model, [n] rising D of its runs.
    losses: by model, [n].
    measure: by model, x.
    budgets: C, in the new measure.
  """
  profiles = []
  for budget in budgets:
    points = []
    for name, x in measure.items():
      d = budget / x
      if len(tokens[name]) >= 2 and tokens[name][0] <= d <= tokens[name][-1]:
        log_loss = np.interp(np.log(d), np.log(tokens[name]), np.log(losses[name]))
        points.append((x, float(np.exp(log_loss))))
    if len(points) >= MIN_POINTS:
      sizes, values = np.array(sorted(points)).T
      profiles.append(Profile(float(budget), sizes, values))
  return profiles
