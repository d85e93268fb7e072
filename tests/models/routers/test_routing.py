import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import moe_config, router_traits
from moe_jax.models import routers, transformer
from moe_jax.models.routers import ROUTERS, routing, scoring
from tests import tiny
from tests.models.routers import routes

SIGMOID_LOGITS = np.log(routes.PROBS / (1 - routes.PROBS))


def test_every_router_of_the_config_exists():
  assert list(ROUTERS) == list(router_traits.LIBRARY)
  assert set(scoring.SCORE_FUNCS) == set(moe_config.SCORE_FUNCS)


def test_sigmoid_scores_are_each_experts_own():
  cfg = routes.make(score_func='sigmoid', norm_topk_prob=True, routed_scaling_factor=2.5)
  gates, idx, scores = routes.route(cfg, SIGMOID_LOGITS)
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  np.testing.assert_allclose(scores, routes.PROBS, **routes.EXACT)
  # DeepSeek-V3: divided by the sum of the chosen, then times the factor: 2.5 * 4/7 ...
  want = 2.5 * np.array([[[4 / 7, 3 / 7], [4.5 / 7, 2.5 / 7], [2 / 3, 1 / 3]]])
  np.testing.assert_allclose(gates, want, **routes.EXACT)
  raw = routes.route(routes.make(score_func='sigmoid', routed_scaling_factor=16.0), SIGMOID_LOGITS)
  np.testing.assert_allclose(
    raw.gates, 16 * np.take_along_axis(routes.PROBS, idx, -1), **routes.EXACT
  )


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'score_func': 'sigmoid'},
    {'router': 'expert_choice'},
    {'router': 'ds_moe'},
    {'router': 'balanced'},
    {'router': 'skewed', 'options__skew': 0.5},
    {'router': 'hash', 'norm_topk_prob': False},  # 1 / K: summing to 1 by itself
    {'router': 'replay', 'options__replay_path': 'x', 'options__replay_rows': 1},
  ],
  ids=lambda o: o.get('router', 'topk'),
)
def test_renormalised_gates_sum_to_the_scaling_factor(overrides):
  cfg = routes.make(**({'norm_topk_prob': True, 'routed_scaling_factor': 2.5} | overrides))
  table = np.array([[0, 2]] * 4, np.int32)
  state = {'table': table, 'assignments': table[None]}
  tokens = routes.tokens_of(1, 3, mask=[[1, 1, 0]])
  got = routes.route(cfg, tokens=tokens, state=state)
  used = (np.asarray(got.expert_idx) < 4).any(-1)  # expert choice may pass a token by
  assert used[0, :2].any() and not used[0, 2]
  np.testing.assert_allclose(got.gates.sum(-1), np.where(used, 2.5, 0.0), **routes.EXACT)


# Gradients.


def gate_gradient(cfg, weights, logits=routes.LOGITS):
  """d sum(weights * gates) / d logits, [3, E] for the three tokens of LOGITS."""
  scores_of = scoring.SCORE_FUNCS[cfg.score_func]

  def loss(logits):
    scores = scores_of(logits)
    inputs = routing.Inputs(scores, scores, routes.tokens_of(1, 3), 0, {})
    return (jnp.array(weights) * ROUTERS['topk'].route(inputs, cfg, True).gates).sum()

  return np.asarray(tiny.jit(jax.grad(loss))(logits))[0]


def test_gradient_of_raw_gates_is_the_softmax_jacobian_of_the_chosen():
  got = gate_gradient(routes.make(), [2.0, 5.0])
  # Token 0 keeps p0 = .4 and p1 = .3 with weights 2 and 5: w = (2, 5, 0, 0), sum w p = 2.3,
  # d/dz_j = p_j (w_j - 2.3) = (.4 * -.3, .3 * 2.7, .2 * -2.3, .1 * -2.3).
  np.testing.assert_allclose(got[0], [-0.12, 0.81, -0.46, -0.23], atol=1e-6)
  np.testing.assert_allclose(got.sum(-1), 0, atol=1e-6)  # softmax ignores a common shift


def test_gradient_of_sigmoid_gates_reaches_only_the_chosen():
  got = gate_gradient(routes.make(score_func='sigmoid'), [2.0, 5.0], SIGMOID_LOGITS)
  # s (1 - s): 2 * .4 * .6, 5 * .3 * .7
  np.testing.assert_allclose(got[0], [0.48, 1.05, 0, 0], atol=1e-6)
  assert (got[0, 2:] == 0).all()


def test_gradient_of_normalised_gates_reaches_only_the_chosen():
  got = gate_gradient(routes.make(norm_topk_prob=True), [2.0, 5.0])
  # Token 0: g0 = 4/7, g1 = 3/7, sum w g = 23/7; d/dz_0 = g0 (2 - 23/7) = -36/49, d/dz_1 = +36/49.
  np.testing.assert_allclose(got[0], [-36 / 49, 36 / 49, 0, 0], atol=1e-6)


def test_gradient_of_a_renormalised_single_gate_vanishes_but_switch_keeps_one():
  # The reason why Switch uses the raw probability.
  assert np.abs(gate_gradient(routes.make(k=1, norm_topk_prob=True), [1.0])).max() < 1e-6
  # Token 0: d p0 / dz = p0 (e0 - p) = .4 * (.6, -.3, -.2, -.1)
  want = [0.24, -0.12, -0.08, -0.04]
  np.testing.assert_allclose(gate_gradient(routes.make(k=1), [1.0])[0], want, atol=1e-6)


def test_without_takes_masked_tokens_and_choices_out():
  decision = routing.Routing(
    jnp.array([[[0.4, 0.3], [0.45, 0.25], [0.5, 0.25]]]),
    jnp.array([[[0, 1], [3, 2], [1, 3]]]),
    jnp.asarray(routes.PROBS),
  )
  out = routing.without(decision, jnp.array([[True, False, True]]))
  np.testing.assert_array_equal(out.expert_idx, [[[0, 1], [4, 4], [1, 3]]])  # E = 4: nowhere
  np.testing.assert_allclose(out.gates, [[[0.4, 0.3], [0, 0], [0.5, 0.25]]], **routes.EXACT)
  np.testing.assert_array_equal(out.scores[0, 1], np.zeros(4))
  np.testing.assert_array_equal(out.scores[0, ::2], decision.scores[0, ::2])
  keep = jnp.array([[[True, False], [True, True], [False, False]]])
  out = routing.without_choices(decision, keep)
  np.testing.assert_array_equal(out.expert_idx, [[[0, 4], [3, 2], [4, 4]]])
  np.testing.assert_allclose(out.gates, [[[0.4, 0], [0.45, 0.25], [0, 0]]], **routes.EXACT)
  np.testing.assert_array_equal(out.scores, decision.scores)
  assert out.expert_idx.dtype == jnp.int32


def test_masked_tokens_get_no_gradient():
  def loss(logits):
    scores = jax.nn.softmax(logits)
    inputs = routing.Inputs(scores, scores, routes.tokens_of(1, 3), 0, {})
    decision = ROUTERS['topk'].route(inputs, routes.make(), True)
    out = routing.without(decision, jnp.array([[True, False, True]]))
    return out.gates.sum() + (out.scores * jnp.arange(4)).sum()

  grad = np.asarray(tiny.jit(jax.grad(loss))(routes.LOGITS))[0]
  assert (grad[1] == 0).all()
  assert (grad[[0, 2]] != 0).all()


def test_a_router_from_outside():
  """Its name is refused before it is registered, and never replaces one of the library."""

  def route(inputs, cfg, train):
    expert_idx = routing.keep_best(-inputs.selection, cfg.num_experts_per_tok)
    gates = routing.gates_of(inputs.scores, expert_idx, cfg)
    return routing.Routing(gates, expert_idx, inputs.scores)

  traits = router_traits.RouterTraits(causal=True)
  with pytest.raises(errors.InputError, match=r'moe\.router=.*routers\.register has'):
    tiny.make(model__moe__router='worst')
  routers.register('worst', routing.Router(route, traits))
  try:
    model = tiny.make(model__moe__router='worst').model
    rows = tiny.batch()
    out = tiny.jit(transformer.Transformer(model).apply)(
      {'params': tiny.params(model), 'router_state': {}},
      *(rows[key] for key in ('tokens', 'positions', 'segment_ids')),
    )
    assert out.stats.sums.load.sum() == 2 * 2 * (rows['segment_ids'] > 0).sum()  # layers, K
    with pytest.raises(errors.InputError, match='choose another name'):
      routers.register('topk', routing.Router(route, traits))
  finally:
    del routers.ROUTERS['worst'], router_traits.REGISTERED['worst']
