"""Time that a run loses to checkpoints and failures, and how often it should save.

An estimate: chips fail independently, at a constant rate that the user states, and any of them ends
the step of all. Then M, the mean time between failures of the run, is that of a chip over their
number. Steps stand still for C seconds per checkpoint; after a failure it takes R seconds until
steps run again, in which the next failure may come, and the work since the last checkpoint is lost.

  Young (Communications of the ACM 17(9), 1974)           sqrt(2 C M) between checkpoints
  Daly (Future Generation Computer Systems 22(3), 2006)   the same with two more terms, or M if C is
                                                          2 M or more (his equation 37)

The share of time that counts is exact under these assumptions (Daly's equation 20): T seconds of
work between checkpoints take M exp(R / M) (exp((T + C) / M) - 1) on average. What was measured of a
real run is in its `goodput.json`.
"""

import dataclasses
import math

from moe_jax import errors

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Failures:
  """What the user states."""

  mtbf_hours: float  # of one chip with its share of host and network
  checkpoint_seconds: float  # in which steps stand still while one is written
  restart_seconds: float  # from a failure to the first step after it

  def __post_init__(self):
    """Checks the values."""
    for name in ('mtbf_hours', 'checkpoint_seconds'):
      value = getattr(self, name)
      errors.require(
        value > 0 and math.isfinite(value), f'--{name}={value} must be a number above 0'
      )
    errors.require(
      self.restart_seconds >= 0 and math.isfinite(self.restart_seconds),
      f'--restart_seconds={self.restart_seconds} must be 0 or a number above it',
    )


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Where the time of a run goes."""

  num_chips: int
  mtbf_seconds: float  # of the run
  young_seconds: float  # of work between checkpoints, by Young's formula
  interval_seconds: float  # by Daly's, which the shares are for
  checkpoints: float  # share of the time for writing them
  failures: float  # share for restarts and for work that is done again
  goodput: float  # the share that is left


def young_interval(checkpoint_seconds: float, mtbf_seconds: float) -> float:
  """Young's seconds of work between checkpoints."""
  return math.sqrt(2 * checkpoint_seconds * mtbf_seconds)


def daly_interval(checkpoint_seconds: float, mtbf_seconds: float) -> float:
  """Daly's seconds of work between checkpoints."""
  ratio = checkpoint_seconds / (2 * mtbf_seconds)
  if ratio >= 1:
    return mtbf_seconds
  longer = 1 + math.sqrt(ratio) / 3 + ratio / 9
  return young_interval(checkpoint_seconds, mtbf_seconds) * longer - checkpoint_seconds


def mean_seconds(interval: float, checkpoint: float, restart: float, mtbf: float) -> float:
  """Mean seconds that pass for `interval` seconds of work and their checkpoint."""
  return mtbf * math.exp(restart / mtbf) * math.expm1((interval + checkpoint) / mtbf)


def goodput(stated: Failures, num_chips: int) -> Goodput:
  """The shares of a run on so many chips that saves at Daly's interval.

  Raises:
    errors.InputError: failures come so fast that the run would never get anywhere.
  """
  mtbf = stated.mtbf_hours * _HOUR / num_chips
  checkpoint, restart = stated.checkpoint_seconds, stated.restart_seconds
  errors.require(
    max(checkpoint, restart) < 20 * mtbf,
    f'--mtbf_hours={stated.mtbf_hours:g} on {num_chips} chips is a failure every {mtbf:.3g} s, and '
    f'a checkpoint ({checkpoint:g} s) or a restart ({restart:g} s) would never end; state a longer '
    'time between failures of a chip, or shorter ones for these two',
  )
  interval = daly_interval(checkpoint, mtbf)
  total = mean_seconds(interval, checkpoint, restart, mtbf)
  return Goodput(
    num_chips=num_chips,
    mtbf_seconds=mtbf,
    young_seconds=young_interval(checkpoint, mtbf),
    interval_seconds=interval,
    checkpoints=checkpoint / total,
    failures=1 - (interval + checkpoint) / total,
    goodput=interval / total,
  )
