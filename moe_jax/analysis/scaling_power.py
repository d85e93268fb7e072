"""How many runs would tell the exponents of rate and batch from 0, found by drawing studies.

A study of hyper-parameters (`scaling_laws.near_optimal`) says little where seeds scatter by more
than the band of near-optimal points. Averages over n seeds scatter by 1 / sqrt(n), and an exponent
is known the better the more decades of C the budgets span. Here the truth is given: a power law of
the optimum, and how steeply the loss rises around it, as grids that were trained have it. Studies
are drawn around it, and each is analysed as a real one is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.analysis import scaling_laws

PER_DECADE = math.log(10) / math.log(2)  # budgets are factors of 2 apart
REPEATS = (1, 2, 4, 8, 16, 32, 64)  # seeds per point that are tried
POWER = 0.8  # share of the studies that must exclude 0
STUDIES = 40  # that are drawn


class Truth(NamedTuple):
  """Around which studies are drawn; losses are shares of the lowest one of their budget."""

  rate: float  # exponent of the best rate in C
  batch: float  # of the best batch
  curvature: np.ndarray  # [2, 2] of the loss in (ln rate, ln batch), half the Hessian
  noise: float  # standard deviation between seeds
  grid: tuple[int, int]  # rates and batches about one optimum, factors of 2 apart


class Study(NamedTuple):
  """What a study of these dimensions would find."""

  decades: float  # of C between its budgets
  budgets: int
  repeats: int  # seeds per point
  runs: int
  power: float  # share of such studies whose interval excludes 0


def curvature(surfaces: Sequence[scaling_laws.Surface]) -> np.ndarray:
  """[2, 2] mean of those of the surfaces that have a minimum, as shares of the lowest loss.

  Raises:
    ValueError: none has one.
  """
  good = [s for s in surfaces if not s.problem.startswith('no minimum')]
  if not good:
    raise ValueError('no surface has a minimum, so nothing says how losses rise around it')
  c = np.mean([s.coefficients[3:] / s.lowest for s in good], axis=0)
  return np.array([[c[0], c[1] / 2], [c[1] / 2, c[2]]])


def power(
  truth: Truth,
  which: str,
  decades: float,
  repeats: int,
  *,
  band: float = scaling_laws.NEAR_OPTIMAL,
  studies: int = STUDIES,
  samples: int = 100,
  seed: int = 0,
) -> Study:
  """The share of drawn studies that tell an exponent from 0.

  Args:
    truth: see there.
    which: 'rate' or 'batch'.
    decades: between the smallest and the largest budget.
    repeats: seeds whose mean each point of the grid is.
    band: of near-optimal points.
    studies: how many are drawn.
    samples: of each one's bootstrap.
    seed: of all draws.
  """
  num = max(2, round(decades * PER_DECADE) + 1)
  rng, noise = np.random.default_rng(seed), truth.noise / math.sqrt(repeats)
  spans, excluded = np.linspace(0, decades * math.log(10), num), 0
  for i in range(studies):
    # The grid lies on powers of 2, wherever the optimum of the first budget lies between them.
    points = _points(truth, spans, rng.uniform(0, math.log(2), 2))
    budgets, rates, batches, losses = points.T
    drawn = losses * (1 + noise * rng.standard_normal(len(losses)))
    values = np.exp(rates if which == 'rate' else batches)
    found = scaling_laws.bootstrap_near_optimal(
      np.exp(budgets), values, drawn, noise, band=band, samples=samples, seed=seed + i
    )
    low, high = scaling_laws.interval(found[:, 1])
    excluded += not low <= 0 <= high
  return Study(decades, num, repeats, len(points) * repeats, excluded / studies)


def _points(truth: Truth, log_budgets: np.ndarray, shift: np.ndarray) -> np.ndarray:
  """[points, 4] ln C, ln rate, ln batch and true loss of a study.

  All budgets have one grid, which reaches as far about the first optimum as about the last: one
  that followed the optimum would give away what is to be found.
  """
  step, best = math.log(2), shift + np.outer(log_budgets, [truth.rate, truth.batch])  # [C, 2]
  axes = []
  for n, ends in zip(truth.grid, np.sort(best[[0, -1]], axis=0).T):
    low, high = (round(float(end) / step) for end in ends)
    axes.append(step * np.arange(low - (n - 1) // 2, high + n // 2 + 1))
  u, v = (axis.ravel() for axis in np.meshgrid(*axes, indexing='ij'))
  parts = []
  for log_budget, centre in zip(log_budgets, best):
    away = np.stack([u, v], axis=1) - centre
    loss = 1 + np.einsum('pi,ij,pj->p', away, truth.curvature, away)
    parts.append(np.column_stack([np.full(len(u), log_budget), u, v, loss]))
  return np.concatenate(parts)


def least(truth: Truth, which: str, decades: float, *, band: float) -> Study | None:
  """The study of so many decades with the fewest seeds per point that has `POWER`; None: none."""
  for repeats in REPEATS:
    found = power(truth, which, decades, repeats, band=band)
    if found.power >= POWER:
      return found
  return None
