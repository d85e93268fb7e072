import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import resampling

WEIGHTS = np.array([0.5, 1.5, 1.0, 0.0, 0.73])


def test_counts_are_expectations_rounded_and_add_up():
  want = 37 * WEIGHTS / WEIGHTS.sum()
  found = np.array([resampling.copies(WEIGHTS, 37, seed) for seed in range(2000)])
  assert (found.sum(axis=1) == 37).all() and not found[:, 3].any()
  assert (np.floor(want) <= found).all() and (found <= np.ceil(want)).all()
  np.testing.assert_allclose(found.mean(axis=0), want, atol=0.05)


def test_equal_weights_take_equally_often_and_a_seed_is_one_draw():
  assert (resampling.copies(np.ones(7), 21, 3) == 3).all()
  first, second = (resampling.copies(WEIGHTS, 10, seed) for seed in (5, 5))
  assert np.array_equal(first, second)


@pytest.mark.parametrize('weights, num', [([1.0, -1.0], 3), ([0.0, 0.0], 3), ([1.0], 0)])
def test_nothing_to_take(weights, num):
  with pytest.raises(errors.InputError, match='at least 1, and weights one number per example'):
    resampling.copies(np.array(weights), num, 0)
