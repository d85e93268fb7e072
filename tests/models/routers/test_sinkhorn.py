import numpy as np

from moe_jax.models.routers import sinkhorn
from tests.models.routers import routes

# Routers that do not read.


def test_sinkhorn_balances_in_training_only():
  probs = np.array([[[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]])
  cfg = routes.make(2, 1, router='sinkhorn')
  plain = routes.route(cfg, np.log(probs), train=False)
  np.testing.assert_array_equal(plain.expert_idx[0, :, 0], [0, 0, 0, 0])
  # Columns sum to 2.8 and 1.2: (.321, .083), (.286, .167), (.214, .333), (.179, .417); rows to 1:
  # (.794, .206), (.632, .368), (.391, .609), (.300, .700). Further rounds keep the order.
  got = routes.route(cfg, np.log(probs))
  np.testing.assert_array_equal(got.expert_idx[0, :, 0], [0, 0, 1, 1])
  np.testing.assert_allclose(got.gates[0, :, 0], [0.9, 0.8, 0.4, 0.5], **routes.EXACT)
  # Without the last token, columns sum to 2.3 and .7: rows (.732, .268), (.549, .451),
  # (.313, .687); padding weighs nothing and goes nowhere.
  padded = routes.tokens_of(1, 4, mask=[[1, 1, 1, 0]])
  got = routes.route(cfg, np.log(probs), padded)
  np.testing.assert_array_equal(got.expert_idx[0, :, 0], [0, 0, 1, 2])


def test_experts_weigh_alike_in_a_row():
  rng = np.random.default_rng(0)
  scores = rng.random((2, 16, 4)).astype(np.float32) * [8, 1, 1, 1]
  mask = np.ones((2, 16), bool)
  mask[1, 10:] = False
  want = np.where(mask[..., None], scores, 0).astype(np.float64)
  for _ in range(8):
    want /= want.sum(axis=1, keepdims=True)
    want /= np.maximum(want.sum(axis=2, keepdims=True), 1e-20)
  got = np.asarray(sinkhorn.balanced_scores(scores, mask))
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(got.sum(-1), mask, rtol=1e-5)
  np.testing.assert_allclose(got.sum(1), mask.sum(1)[:, None] / 4 * np.ones(4), rtol=0.05)
