"""Hand-computed routing: logits are log probabilities, so that softmax gives these numbers back."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.models.routers import ROUTERS, routing

PROBS = np.array(
  [[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45], [0.125, 0.5, 0.125, 0.25]]], np.float32
)  # [B=1, L=3, E=4]
LOGITS = jnp.log(PROBS)
EXACT = dict(rtol=1e-6)  # float32 exp and log are good to a few units in the last place


def cfg(k, norm=False):
  return types.SimpleNamespace(num_experts_per_tok=k, norm_topk_prob=norm)


def test_every_router_of_the_config_exists():
  assert set(ROUTERS) == set(config.ROUTERS)


def test_softmax_topk_keeps_raw_probabilities():
  gates, idx, scores = ROUTERS['softmax_topk'](LOGITS, cfg(2))
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  np.testing.assert_allclose(gates, [[[0.4, 0.3], [0.45, 0.25], [0.5, 0.25]]], **EXACT)
  np.testing.assert_allclose(scores, PROBS, **EXACT)
  assert (gates.dtype, idx.dtype) == (jnp.float32, jnp.int32)


def test_softmax_topk_normalised_divides_by_the_sum_of_the_kept():
  gates, idx, scores = ROUTERS['softmax_topk'](LOGITS, cfg(2, norm=True))
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  # .4 / (.4 + .3), .3 / .7;  .45 / (.45 + .25), .25 / .7;  .5 / (.5 + .25), .25 / .75
  want = [[[4 / 7, 3 / 7], [4.5 / 7, 2.5 / 7], [2 / 3, 1 / 3]]]
  np.testing.assert_allclose(gates, want, **EXACT)
  np.testing.assert_allclose(scores, PROBS, **EXACT)  # the balance loss averages raw scores


def test_softmax_topk_with_all_experts_keeps_everything():
  gates, idx, _ = ROUTERS['softmax_topk'](LOGITS, cfg(4))
  np.testing.assert_allclose(gates.sum(-1), 1, **EXACT)
  np.testing.assert_array_equal(np.sort(idx, -1), np.broadcast_to(np.arange(4), (1, 3, 4)))


def test_ties_go_to_the_first_experts():
  idx = ROUTERS['softmax_topk'](jnp.zeros((1, 2, 4)), cfg(2)).expert_idx
  np.testing.assert_array_equal(idx, [[[0, 1], [0, 1]]])


def test_gshard_normalises_two_gates():
  gates, idx, scores = ROUTERS['gshard_top2'](LOGITS, cfg(2))
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  np.testing.assert_allclose(gates, [[[4 / 7, 3 / 7], [4.5 / 7, 2.5 / 7], [2 / 3, 1 / 3]]], **EXACT)
  np.testing.assert_allclose(scores, PROBS, **EXACT)


def test_switch_keeps_the_winners_probability():
  gates, idx, _ = ROUTERS['switch_top1'](LOGITS, cfg(1))
  np.testing.assert_array_equal(idx, [[[0], [3], [1]]])
  np.testing.assert_allclose(gates, [[[0.4], [0.45], [0.5]]], **EXACT)


def test_large_logits_stay_finite():
  gates = ROUTERS['softmax_topk'](jnp.array([[[1e4, 0.0, -1e4]]]), cfg(2)).gates
  np.testing.assert_array_equal(gates, [[[1.0, 0.0]]])


def gate_gradient(name, router_cfg, weights):
  """d sum(weights * gates) / d logits, [3, E] for the three tokens of LOGITS."""
  loss = lambda logits: (jnp.array(weights) * ROUTERS[name](logits, router_cfg).gates).sum()
  return np.asarray(jax.grad(loss)(LOGITS))[0]


def test_gradient_of_raw_gates_is_the_softmax_jacobian_of_the_chosen():
  got = gate_gradient('softmax_topk', cfg(2), [2.0, 5.0])
  # Token 0 keeps p0 = .4 and p1 = .3 with weights 2 and 5: w = (2, 5, 0, 0), sum w p = 2.3,
  # d/dz_j = p_j (w_j - 2.3) = (.4 * -.3, .3 * 2.7, .2 * -2.3, .1 * -2.3).
  np.testing.assert_allclose(got[0], [-0.12, 0.81, -0.46, -0.23], atol=1e-6)
  np.testing.assert_allclose(got.sum(-1), 0, atol=1e-6)  # softmax ignores a common shift


@pytest.mark.parametrize('name, norm', [('softmax_topk', True), ('gshard_top2', False)])
def test_gradient_of_normalised_gates_reaches_only_the_chosen(name, norm):
  got = gate_gradient(name, cfg(2, norm), [2.0, 5.0])
  # Token 0: g0 = 4/7, g1 = 3/7, sum w g = 23/7; d/dz_0 = g0 (2 - 23/7) = -36/49, d/dz_1 = +36/49.
  np.testing.assert_allclose(got[0], [-36 / 49, 36 / 49, 0, 0], atol=1e-6)


def test_gradient_of_a_renormalised_single_gate_vanishes_but_switch_keeps_one():
  # The reason why Switch uses the raw probability.
  assert np.abs(gate_gradient('softmax_topk', cfg(1, norm=True), [1.0])).max() < 1e-6
  # Token 0: d p0 / dz = p0 (e0 - p) = .4 * (.6, -.3, -.2, -.1)
  np.testing.assert_allclose(
    gate_gradient('switch_top1', cfg(1), [1.0])[0], [0.24, -0.12, -0.08, -0.04], atol=1e-6
  )


def test_without_takes_masked_tokens_out():
  decision = ROUTERS['softmax_topk'](LOGITS, cfg(2))
  out = routing.without(decision, jnp.array([[True, False, True]]))
  np.testing.assert_array_equal(out.expert_idx, [[[0, 1], [4, 4], [1, 3]]])  # E = 4: nowhere
  np.testing.assert_allclose(out.gates, [[[0.4, 0.3], [0, 0], [0.5, 0.25]]], **EXACT)
  np.testing.assert_array_equal(out.scores[0, 1], np.zeros(4))
  np.testing.assert_array_equal(out.scores[0, ::2], decision.scores[0, ::2])
  assert out.expert_idx.dtype == jnp.int32


def test_without_stops_the_gradient_of_masked_tokens():
  mask = jnp.array([[True, False, True]])

  def loss(logits):
    out = routing.without(ROUTERS['softmax_topk'](logits, cfg(2)), mask)
    return out.gates.sum() + (out.scores * jnp.arange(4)).sum()

  grad = np.asarray(jax.grad(loss)(LOGITS))[0]
  assert (grad[1] == 0).all()
  assert (grad[[0, 2]] != 0).all()
