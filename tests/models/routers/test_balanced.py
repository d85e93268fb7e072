import numpy as np
import pytest

from tests.models.routers import routes


def test_balanced_deals_in_turn():
  # Two rows of 3 tokens, E = 5, K = 2; row 1 starts where row 0 ended.
  got = routes.route(routes.make(5, router='balanced'), np.zeros((2, 3, 5)))
  want = [[[0, 1], [2, 3], [4, 0]], [[1, 2], [3, 4], [0, 1]]]
  np.testing.assert_array_equal(got.expert_idx, want)
  np.testing.assert_allclose(got.gates, np.full((2, 3, 2), 0.2), **routes.EXACT)  # their own scores


@pytest.mark.parametrize('e, k', [(8, 2), (5, 3), (7, 7)])
def test_balanced_is_balanced(e, k):
  idx = np.asarray(
    routes.route(routes.make(e, k, router='balanced'), np.zeros((4, 9, e))).expert_idx
  )
  load = np.bincount(idx.ravel(), minlength=e)
  assert load.sum() == 36 * k and load.max() - load.min() <= 1
  assert all(len(set(token)) == k for token in idx.reshape(-1, k).tolist())
