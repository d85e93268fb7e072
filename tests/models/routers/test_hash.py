import jax
import numpy as np

from moe_jax.models.routers import ROUTERS, routing
from tests import tiny
from tests.models.routers import routes

# Hash.


def test_hash_reads_the_table_and_weighs_evenly():
  cfg = routes.make(router='hash', routed_scaling_factor=3.0)
  table = np.array([[0, 1], [3, 2], [2, 0]], np.int32)
  tokens = routes.tokens_of(1, 4, ids=[[1, 2, 1, 0]], mask=[[1, 1, 1, 0]])
  got = routes.route(cfg, np.zeros((1, 4, 4)), tokens, state={'table': table})
  np.testing.assert_array_equal(got.expert_idx, [[[3, 2], [2, 0], [3, 2], [4, 4]]])
  np.testing.assert_allclose(got.gates, [[[1.5, 1.5]] * 3 + [[0, 0]]], **routes.EXACT)  # 3 / K
  np.testing.assert_allclose(
    got.scores, [[[0, 0, 0.5, 0.5], [0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5], [0] * 4]], **routes.EXACT
  )
  assert not ROUTERS['hash'].traits.has_logits


def test_random_table_has_different_experts_all_equally_likely():
  cfg = routes.make(8, 3, router='hash')
  init = tiny.jit(lambda key: ROUTERS['hash'].init_state(cfg, routing.Sizes(4000, 16), key))
  table = np.asarray(init(jax.random.key(0))['table'])
  assert table.shape == (4000, 3) and table.dtype == np.int32
  assert all(len(set(row)) == 3 for row in table)
  # Binomial(4000, 3/8): 1500 +- 4 * sqrt(4000 * 3/8 * 5/8) = 122; the first choice: 500 +- 84.
  assert np.abs(np.bincount(table.ravel(), minlength=8) - 1500).max() < 122
  assert np.abs(np.bincount(table[:, 0], minlength=8) - 500).max() < 84
  assert (np.asarray(init(jax.random.key(1))['table']) != table).any()  # layers differ
