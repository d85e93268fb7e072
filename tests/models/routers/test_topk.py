import jax.numpy as jnp
import numpy as np

from tests.models.routers import routes


def test_topk_keeps_raw_probabilities():
  gates, idx, scores = routes.route(routes.make())
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  np.testing.assert_allclose(gates, [[[0.4, 0.3], [0.45, 0.25], [0.5, 0.25]]], **routes.EXACT)
  np.testing.assert_allclose(scores, routes.PROBS, **routes.EXACT)
  assert (gates.dtype, idx.dtype) == (jnp.float32, jnp.int32)


def test_topk_normalised_divides_by_the_sum_of_the_kept():
  gates, idx, scores = routes.route(routes.make(norm_topk_prob=True))
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  # .4 / (.4 + .3), .3 / .7;  .45 / (.45 + .25), .25 / .7;  .5 / (.5 + .25), .25 / .75
  want = [[[4 / 7, 3 / 7], [4.5 / 7, 2.5 / 7], [2 / 3, 1 / 3]]]
  np.testing.assert_allclose(gates, want, **routes.EXACT)
  np.testing.assert_allclose(
    scores, routes.PROBS, **routes.EXACT
  )  # the balance loss averages raw scores


def test_topk_with_all_experts_keeps_everything():
  gates, idx, _ = routes.route(routes.make(k=4))
  np.testing.assert_allclose(gates.sum(-1), 1, **routes.EXACT)
  np.testing.assert_array_equal(np.sort(idx, -1), np.broadcast_to(np.arange(4), (1, 3, 4)))


def test_ties_go_to_the_first_experts():
  idx = routes.route(routes.make(), np.zeros((1, 2, 4))).expert_idx
  np.testing.assert_array_equal(idx, [[[0, 1], [0, 1]]])


def test_large_logits_stay_finite():
  gates = routes.route(routes.make(3), np.array([[[1e4, 0.0, -1e4]]])).gates
  np.testing.assert_array_equal(gates, [[[1.0, 0.0]]])
