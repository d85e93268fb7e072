"""Comparisons paired by seed: mean difference, confidence interval, and what it says of a claim.

Two arms that are trained with the same seed share start, data and order, so that their difference
varies less between seeds than either arm does. Student's t over the seeds' differences. `verdict`
looks at one claim alone; `corrected` is for several claims that are read together, after Holm
(1979): with it, the chance that any of them is graded wrongly is at most one minus the confidence.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence

from scipy import stats

from moe_jax import errors

CONFIRMED, CONTRADICTED, UNDECIDED = 'confirmed', 'contradicted', 'not distinguishable'
DIRECTIONS = ('lower', 'higher', 'equal')
LEVEL = 0.05  # of wrong verdicts, one minus the confidence
MOST_SEEDS = 10_000  # that `seeds_that_decide` counts to


@dataclasses.dataclass(frozen=True)
class Interval:
  """Mean of a quantity over seeds with its confidence interval; without one for a single seed.

  All three are NaN where a seed has no finite value, as a run that diverged.
  """

  mean: float
  low: float
  high: float
  num_seeds: int

  @property
  def covers_zero(self) -> bool:
    """Whether no difference is as good an account of the figures."""
    return not (self.low > 0 or self.high < 0)

  def text(self, digits: int = 3, *, sign: bool = True) -> str:
    """`-0.012 [-0.020, -0.004]`; the mean alone for one seed, words where it is not finite."""
    if not math.isfinite(self.mean):
      return 'not finite'
    form = f'{"+" if sign else ""}.{digits}f'
    if self.num_seeds == 1:
      return f'{self.mean:{form}} (one seed)'
    return f'{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]'


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
  """Student's t interval of the mean of independent values; infinitely wide for a single one.

  Values that are not all finite have neither a mean nor an interval: its ends are NaN, and it
  covers zero.

  Args:
    values: one per seed.
    confidence: share of intervals that hold the true mean.

  Raises:
    errors.InputError: there is no value.
  """
  errors.require(bool(values), 'an interval needs at least one seed')
  num = len(values)
  if not _finite(values):
    return Interval(math.nan, math.nan, math.nan, num)
  mean = statistics.fmean(values)
  if num == 1:
    return Interval(mean, -math.inf, math.inf, 1)
  half = _quantile(confidence, num - 1) * statistics.stdev(values) / math.sqrt(num)
  return Interval(mean, mean - half, mean + half, num)


def _finite(values: Sequence[float]) -> bool:
  return all(map(math.isfinite, values))


@functools.cache
def _quantile(confidence: float, degrees: int) -> float:
  """Half an interval in standard errors; curves ask for the same one at every point."""
  return float(stats.t.ppf(0.5 + confidence / 2, degrees))


def difference(
  values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95
) -> Interval:
  """Of `values` minus `baseline`, seed by seed.

  Raises:
    ValueError: their numbers differ, so they are no pairs.
  """
  return interval([a - b for a, b in zip(values, baseline, strict=True)], confidence)


def verdict(interval: Interval, direction: str, margin: float = 0.0) -> str:
  """What a difference says of the claim that it is 'lower' or 'higher' than 0, or 'equal'.

  A direction is confirmed or contradicted by an interval without zero. Equality is confirmed by an
  interval within the margin, contradicted by one outside of it, and undecided between.

  Args:
    interval: of the differences.
    direction: one of `DIRECTIONS`.
    margin: largest difference, either way, that counts as equal; only for 'equal'.
  """
  if direction not in DIRECTIONS:
    raise ValueError(f'direction={direction!r} must be one of {", ".join(DIRECTIONS)}')
  if direction == 'equal':
    if -margin <= interval.low and interval.high <= margin:
      return CONFIRMED
    return CONTRADICTED if interval.low > margin or interval.high < -margin else UNDECIDED
  if interval.covers_zero:
    return UNDECIDED
  return CONFIRMED if (interval.mean < 0) == (direction == 'lower') else CONTRADICTED


def p_value(values: Sequence[float], direction: str, margin: float = 0.0) -> float:
  """The level at which `verdict` of these differences stops being 'not distinguishable'.

  Two-sided Student's t against 0 for a direction. For 'equal' it is that of the two one-sided tests
  against the margin, or of the difference lying outside of it, whichever is clearer; doubled, since
  an interval spends half its level on each side. 1 for a single value, and for values that are not
  all finite.

  Args:
    values: differences, one per seed.
    direction: one of `DIRECTIONS`.
    margin: as of `verdict`.
  """
  num = len(values)
  if num == 1 or not _finite(values):
    return 1.0
  mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(num)
  distance = abs(mean) if direction != 'equal' else abs(abs(mean) - margin)
  if not error:
    return 0.0 if distance else 1.0
  return min(1.0, 2 * float(stats.t.sf(distance / error, num - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p values corrected for their number: the i-th smallest of m times m - i, made monotone.

  Args:
    p_values: of the claims, in any order, which the result keeps.
  """
  found, largest = [0.0] * len(p_values), 0.0
  for i, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
    largest = max(largest, min(1.0, (len(p_values) - i) * p_values[k]))
    found[k] = largest
  return found


def corrected(verdicts: Sequence[str], p_values: Sequence[float]) -> list[str]:
  """Verdicts of claims that are read together: undecided where Holm's p value is above `LEVEL`.

  Args:
    verdicts: of `verdict`, claim by claim.
    p_values: of `p_value`, likewise.
  """
  return [v if p <= LEVEL else UNDECIDED for v, p in zip(verdicts, holm(p_values), strict=True)]


def seeds_that_decide(values: Sequence[float], margin: float | None = None) -> int | None:
  """How many seeds tell such differences from 0 in four of five studies, mean and spread as here.

  The least n whose (t_0.975 + t_0.8) s / sqrt(n) is no more than the mean (quantiles of Student's t
  with n - 1 degrees): a two-sided test at `LEVEL` with a power of 80 %. From few seeds it is a
  guess, as their mean and spread are; above 50 it is counted in steps of a fiftieth.

  Args:
    values: differences, one per seed.
    margin: of a claim of equality; n then places the interval within it. None = against 0.

  Returns:
    n, at least 2; None for a single value, for values that are not all finite, or where no number
    does: the mean is 0 or at the margin.
  """
  if len(values) == 1 or not _finite(values):
    return None
  mean, spread = statistics.fmean(values), statistics.stdev(values)
  distance = abs(mean) if margin is None else abs(margin - abs(mean))
  if not distance:
    return None
  number = 2
  while _reach(number) * spread > distance and number < MOST_SEEDS:
    number += max(1, number // 50)
  return number if number < MOST_SEEDS else None


@functools.cache
def _reach(number: int) -> float:
  """The difference that `number` seeds tell from 0 with a power of 80 %, in deviations."""
  return float(stats.t.ppf([1 - LEVEL / 2, 0.8], number - 1).sum()) / math.sqrt(number)
