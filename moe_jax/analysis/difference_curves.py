"""The paired difference of two arms against the tokens trained on: band, crossover, verdict.

The verdict at the end of a run says nothing about a longer one where the difference still moves.
The rule here: over the last third of the tokens, a line in the logarithm of the tokens is fitted
seed by seed. If the interval of its slope excludes zero, and the claim would be graded otherwise
once the tokens have doubled at that slope, the verdict is 'not yet decided'.

Arms whose learning rates differ part in the middle of a run and come together as both fall: such a
slope is one of the schedule, and says nothing of a longer run, which has its own. For them the rule
does not hold (`same_rates`); whole runs of several lengths tell.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_jax import errors
from moe_jax.analysis import paired
from moe_jax.config import schema

NOT_YET = 'not yet decided'
TAIL = 1 / 3  # share of the tokens, at the end, over which the slope is fitted
MIN_POINTS = 3  # of such a fit; a run with fewer in its last third lends earlier ones
NUM_WINDOWS = 30
_OF_RATES = ('peak_lr', 'schedule', 'warmup_steps', 'final_lr_fraction')
_OF_RATES += ('multi_step_boundaries', 'multi_step_factor', 'stages')
RULE = (
  f'A verdict is "{NOT_YET}" where a line in log2(tokens), fitted seed by seed to the training '
  'loss over the last third of the tokens, has a slope whose 95 % interval excludes zero, and the '
  'verdict would be another one if the difference moved at that slope until the tokens have '
  'doubled; never where the learning rates of the two differ, whose slope is one of the schedule'
)


class Curve(NamedTuple):
  """Paired differences of a loss over training, averaged over windows of logged steps."""

  tokens: np.ndarray  # [windows] mean of each window, rising
  differences: np.ndarray  # [seeds, windows]
  end: float  # tokens at its last step, where `tokens` has the middle of a window


class Crossover(NamedTuple):
  """Where the mean difference changes sign for the last time, in tokens."""

  tokens: float
  low: float  # the band lies on the old side there for the last time; 0 = it never does
  high: float  # the band lies on the new side from there on; infinity = it does not yet
  lower_after: bool  # whether the arm is below its baseline afterwards

  def text(self) -> str:
    """`1.20M tokens [0.90M, 1.60M]`, open ends in words."""
    low = f'{millions(self.low)}' if self.low else 'the start'
    high = 'not bounded' if math.isinf(self.high) else millions(self.high)
    return f'{millions(self.tokens)} tokens [{low}, {high}]'


class Outcome(NamedTuple):
  """What a curve says of a claim at its end."""

  end: paired.Interval  # of the difference at the curve's `end`, on each seed's line
  slope: paired.Interval  # of the difference, per doubling of the tokens
  moves: bool  # whether the rule of the module's docstring holds
  verdict: str  # of `paired`, or NOT_YET


def millions(tokens: float) -> str:
  """`0.307M`, `1.20M`, `12.3M`: three digits."""
  digits = max(0, 2 - math.floor(math.log10(max(tokens, 1e4) / 1e6)))
  return f'{tokens / 1e6:.{min(digits, 3)}f}M'


def curve(
  tokens: npt.ArrayLike,
  values: npt.ArrayLike,
  baseline: npt.ArrayLike,
  num_windows: int = NUM_WINDOWS,
) -> Curve:
  """Differences of `values` minus `baseline`, seed by seed, averaged over windows of steps.

  Windows end at squares, so that they are short where curves are steep. Points at which a seed has
  no finite difference are left out.

  Args:
    tokens: [points] rising, trained on at each logged step.
    values: [seeds, points] a loss of an arm.
    baseline: [seeds, points] of its baseline, the same seeds in the same order at the same steps.
    num_windows: at most; each point for itself if these are no more.

  Raises:
    ValueError: the shapes differ, so they are no pairs.
    errors.InputError: no point is left.
  """
  at, first, second = (np.asarray(a, np.float64) for a in (tokens, values, baseline))
  if first.shape != second.shape or first.shape[1:] != at.shape:
    raise ValueError(
      f'values {first.shape} and baseline {second.shape} must be [seeds, {len(at)}] both'
    )
  differences = first - second
  known = np.isfinite(differences).all(axis=0)
  errors.require(bool(known.any()), 'no logged step has a finite loss in every run of both arms')
  at, differences = at[known], differences[:, known]
  num = len(at)
  share = np.arange(num_windows + 1) / num_windows
  edges = np.unique(np.round(num * share**2).astype(int)) if num > num_windows else range(num + 1)
  parts = [slice(a, b) for a, b in zip(edges, edges[1:])]
  return Curve(
    np.asarray([at[part].mean() for part in parts]),
    np.stack([differences[:, part].mean(axis=1) for part in parts], axis=1),
    float(at[-1]),
  )


def band(found: Curve, confidence: float = 1 - paired.LEVEL) -> list[paired.Interval]:
  """Mean and interval over the seeds, window by window; each holds for itself, not all at once."""
  return [paired.interval(column.tolist(), confidence) for column in found.differences.T]


def crossover(found: Curve) -> Crossover | None:
  """Where the mean changes sign for the last time; None if it never does.

  The interval is that of the windows' bands, see `crossing`.
  """
  return crossing(found.tokens, band(found))


def crossing(
  tokens: npt.ArrayLike, around: Sequence[paired.Interval], *, geometric: bool = False
) -> Crossover | None:
  """Where differences at several numbers of tokens change sign for the last time; None = never.

  The interval is between the last one before the crossing that lies on the old side of zero, and
  the first one behind it that lies on the new side.

  Args:
    tokens: [points] rising.
    around: the difference at each of them.
    geometric: draw the line to the crossing over the logarithm of the tokens, as suits points that
      are whole runs of several lengths.
  """
  mean, at = np.asarray([one.mean for one in around]), np.asarray(tokens, np.float64)
  signed = np.flatnonzero(mean)  # arms that have not parted yet differ by nothing at all
  changes = [(i, j) for i, j in zip(signed, signed[1:]) if mean[i] * mean[j] < 0]
  if not changes:
    return None
  old, new = changes[-1]
  share = mean[old] / (mean[old] - mean[new])
  first, second = (np.log(at[i]) if geometric else at[i] for i in (old, new))
  where = first + share * (second - first)
  lower_after = bool(mean[new] < 0)

  def lies(one: paired.Interval, below: bool) -> bool:
    return one.high < 0 if below else one.low > 0

  before = [i for i in range(old + 1) if lies(around[i], not lower_after)]
  after = [i for i in range(new, len(at)) if lies(around[i], lower_after)]
  return Crossover(
    float(np.exp(where) if geometric else where),
    float(at[before[-1]]) if before else 0.0,
    float(at[after[0]]) if after else math.inf,
    lower_after,
  )


def outcome(found: Curve, direction: str, margin: float = 0.0) -> Outcome:
  """The verdict on a claim at the end of the curve, or that the difference still moves.

  Args:
    found: the differences.
    direction: one of `paired.DIRECTIONS`.
    margin: as of `paired.verdict`.

  Raises:
    errors.InputError: the curve has fewer than `MIN_POINTS` points.
  """
  num = len(found.tokens)
  errors.require(
    num >= MIN_POINTS,
    f'a curve of {num} points has no slope; at least {MIN_POINTS} logged steps are needed '
    '(config.train.log_every)',
  )
  tail = found.tokens > (1 - TAIL) * found.tokens[-1]
  tail[-MIN_POINTS:] = True
  doublings = np.log2(found.tokens[tail] / found.end)
  slopes, ends = np.polyfit(doublings, found.differences[:, tail].T, 1)
  slope, end = paired.interval(slopes.tolist()), paired.interval(ends.tolist())
  moves = still_moves(end, slope, direction, margin)
  verdict = NOT_YET if moves else paired.verdict(end, direction, margin)
  return Outcome(end, slope, moves, verdict)


def still_moves(
  now: paired.Interval, slope: paired.Interval, direction: str, margin: float = 0.0
) -> bool:
  """Whether a verdict waits for a longer run, by the rule of the module's docstring.

  Args:
    now: the difference that is graded, of this curve or of the same runs' held-out text.
    slope: of the curve per doubling of the tokens, in the unit of `now`.
    direction: one of `paired.DIRECTIONS`.
    margin: as of `paired.verdict`.
  """
  by = slope.mean
  later = paired.Interval(now.mean + by, now.low + by, now.high + by, now.num_seeds)
  verdicts = (paired.verdict(one, direction, margin) for one in (now, later))
  return not slope.covers_zero and len(set(verdicts)) == 2


def same_rates(first: schema.OptimConfig, second: schema.OptimConfig) -> bool:
  """Whether two runs of one length have the same learning rate at every step."""
  return all(getattr(first, name) == getattr(second, name) for name in _OF_RATES)


def scaled(found: paired.Interval, by: float) -> paired.Interval:
  """An interval in another unit, of which `by` make one; `by` is positive."""
  return paired.Interval(found.mean * by, found.low * by, found.high * by, found.num_seeds)


def sentence(found: Curve, verdict: str, digits: int = 3) -> str:
  """A verdict with the end of its curve, the slope there and the crossover, in words."""
  text = f'{verdict} at {millions(found.end)} tokens'
  if len(found.tokens) >= MIN_POINTS:
    one = outcome(found, 'lower')
    text += f': {one.end.text(digits)}, slope {one.slope.text(digits)} per doubling of the tokens'
  crossing = crossover(found)
  if crossing is not None:
    side = 'below' if crossing.lower_after else 'above'
    return f'{text}; {side} zero after {crossing.text()}'
  mean = found.differences.mean()
  side = 'below' if mean < 0 else 'above' if mean > 0 else 'at'
  return f'{text}; no crossover: the mean is {side} zero throughout'
