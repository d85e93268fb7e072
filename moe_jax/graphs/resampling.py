"""Examples repeated in proportion to their weights, for trainers that know no weights.

A loss over the copies has the weighted loss as its expectation over seeds.
"""

import numpy as np

from moe_jax import errors


def copies(weights: np.ndarray, num: int, seed: int) -> np.ndarray:
  """How often each example is taken, [examples] int64 of sum `num`, by systematic resampling.

  Every count is the example's expectation, num w / sum w, rounded down or up, and equal to it on
  average over seeds (Carpenter, Clifford and Fearnhead, IEE Proceedings 1999). Two calls with the
  same seed and number share their draw, so that they differ by the weights alone.

  Args:
    weights: [examples], none negative.
    num: examples to take.
    seed: decides the one number that is drawn.

  Raises:
    errors.InputError: there is nothing to take.
  """
  weights = np.asarray(weights, np.float64)
  errors.require(
    num > 0 and weights.ndim == 1 and bool((weights >= 0).all()) and weights.sum() > 0,
    f'num={num} must be at least 1, and weights one number per example, none negative and not all '
    '0; correct the weights',
  )
  ends = np.cumsum(weights) / weights.sum() * num
  ends[-1] = num  # rounding must lose nobody
  ticks = np.arange(num) + np.random.default_rng(seed).random()
  return np.diff(np.searchsorted(ticks, ends, side='left'), prepend=0)
