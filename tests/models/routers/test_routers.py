"""Hand-computed routing: logits are log probabilities, so that softmax gives these numbers back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import moe_config, router_traits
from moe_jax.models import routers, transformer
from moe_jax.models.routers import ROUTERS, gshard, routing, scoring
from tests import tiny

PROBS = np.array(
  [[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45], [0.125, 0.5, 0.125, 0.25]]], np.float32
)  # [B=1, L=3, E=4]
LOGITS = np.log(PROBS)
SIGMOID_LOGITS = np.log(PROBS / (1 - PROBS))
EXACT = dict(rtol=1e-6)  # float32 exp and log are good to a few units in the last place


@functools.cache
def make(e=4, k=2, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig`."""
  values = {'num_experts': e, 'num_experts_per_tok': k} | overrides
  return tiny.make(**{f'model__moe__{key}': v for key, v in values.items()}).model.moe


def tokens_of(b, length, mask=None, ids=None, row=None, seed=0) -> routing.Tokens:
  return routing.Tokens(
    ids=np.zeros((b, length), np.int32) if ids is None else np.asarray(ids, np.int32),
    mask=np.ones((b, length), bool) if mask is None else np.asarray(mask, bool),
    row=np.arange(b, dtype=np.int32) if row is None else np.asarray(row, np.int32),
    seed=np.uint32(seed),
  )


@functools.partial(tiny.jit, static_argnums=(0, 1))
def _route(cfg, train, logits, tokens, layer, state):
  scores = scoring.SCORE_FUNCS[cfg.score_func](logits)
  selection = scoring.selection(scores, state, cfg)
  inputs = routing.Inputs(scores, selection, tokens, layer, state)
  return routing.without(ROUTERS[cfg.router].route(inputs, cfg, train), tokens.mask)


def route(cfg, logits=LOGITS, tokens=None, train=True, layer=0, state=None) -> routing.Routing:
  """What the MoE layer does with logits, without its weights."""
  tokens = tokens_of(*logits.shape[:2]) if tokens is None else tokens
  return _route(cfg, train, np.asarray(logits, np.float32), tokens, np.int32(layer), state or {})


def test_every_router_of_the_config_exists():
  assert list(ROUTERS) == list(router_traits.LIBRARY)
  assert set(scoring.SCORE_FUNCS) == set(moe_config.SCORE_FUNCS)


def test_topk_keeps_raw_probabilities():
  gates, idx, scores = route(make())
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  np.testing.assert_allclose(gates, [[[0.4, 0.3], [0.45, 0.25], [0.5, 0.25]]], **EXACT)
  np.testing.assert_allclose(scores, PROBS, **EXACT)
  assert (gates.dtype, idx.dtype) == (jnp.float32, jnp.int32)


def test_topk_normalised_divides_by_the_sum_of_the_kept():
  gates, idx, scores = route(make(norm_topk_prob=True))
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  # .4 / (.4 + .3), .3 / .7;  .45 / (.45 + .25), .25 / .7;  .5 / (.5 + .25), .25 / .75
  want = [[[4 / 7, 3 / 7], [4.5 / 7, 2.5 / 7], [2 / 3, 1 / 3]]]
  np.testing.assert_allclose(gates, want, **EXACT)
  np.testing.assert_allclose(scores, PROBS, **EXACT)  # the balance loss averages raw scores


def test_sigmoid_scores_are_each_experts_own():
  cfg = make(score_func='sigmoid', norm_topk_prob=True, routed_scaling_factor=2.5)
  gates, idx, scores = route(cfg, SIGMOID_LOGITS)
  np.testing.assert_array_equal(idx, [[[0, 1], [3, 2], [1, 3]]])
  np.testing.assert_allclose(scores, PROBS, **EXACT)
  # DeepSeek-V3: divided by the sum of the chosen, then times the factor: 2.5 * 4/7 ...
  want = 2.5 * np.array([[[4 / 7, 3 / 7], [4.5 / 7, 2.5 / 7], [2 / 3, 1 / 3]]])
  np.testing.assert_allclose(gates, want, **EXACT)
  raw = route(make(score_func='sigmoid', routed_scaling_factor=16.0), SIGMOID_LOGITS)
  np.testing.assert_allclose(raw.gates, 16 * np.take_along_axis(PROBS, idx, -1), **EXACT)


def test_topk_with_all_experts_keeps_everything():
  gates, idx, _ = route(make(k=4))
  np.testing.assert_allclose(gates.sum(-1), 1, **EXACT)
  np.testing.assert_array_equal(np.sort(idx, -1), np.broadcast_to(np.arange(4), (1, 3, 4)))


def test_ties_go_to_the_first_experts():
  idx = route(make(), np.zeros((1, 2, 4))).expert_idx
  np.testing.assert_array_equal(idx, [[[0, 1], [0, 1]]])


def test_large_logits_stay_finite():
  gates = route(make(3), np.array([[[1e4, 0.0, -1e4]]])).gates
  np.testing.assert_array_equal(gates, [[[1.0, 0.0]]])


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
  cfg = make(**({'norm_topk_prob': True, 'routed_scaling_factor': 2.5} | overrides))
  table = np.array([[0, 2]] * 4, np.int32)
  state = {'table': table, 'assignments': table[None]}
  tokens = tokens_of(1, 3, mask=[[1, 1, 0]])
  got = route(cfg, tokens=tokens, state=state)
  used = (np.asarray(got.expert_idx) < 4).any(-1)  # expert choice may pass a token by
  assert used[0, :2].any() and not used[0, 2]
  np.testing.assert_allclose(got.gates.sum(-1), np.where(used, 2.5, 0.0), **EXACT)


# Gradients.


def gate_gradient(cfg, weights, logits=LOGITS):
  """d sum(weights * gates) / d logits, [3, E] for the three tokens of LOGITS."""
  scores_of = scoring.SCORE_FUNCS[cfg.score_func]

  def loss(logits):
    scores = scores_of(logits)
    inputs = routing.Inputs(scores, scores, tokens_of(1, 3), 0, {})
    return (jnp.array(weights) * ROUTERS['topk'].route(inputs, cfg, True).gates).sum()

  return np.asarray(tiny.jit(jax.grad(loss))(logits))[0]


def test_gradient_of_raw_gates_is_the_softmax_jacobian_of_the_chosen():
  got = gate_gradient(make(), [2.0, 5.0])
  # Token 0 keeps p0 = .4 and p1 = .3 with weights 2 and 5: w = (2, 5, 0, 0), sum w p = 2.3,
  # d/dz_j = p_j (w_j - 2.3) = (.4 * -.3, .3 * 2.7, .2 * -2.3, .1 * -2.3).
  np.testing.assert_allclose(got[0], [-0.12, 0.81, -0.46, -0.23], atol=1e-6)
  np.testing.assert_allclose(got.sum(-1), 0, atol=1e-6)  # softmax ignores a common shift


def test_gradient_of_sigmoid_gates_reaches_only_the_chosen():
  got = gate_gradient(make(score_func='sigmoid'), [2.0, 5.0], SIGMOID_LOGITS)
  # s (1 - s): 2 * .4 * .6, 5 * .3 * .7
  np.testing.assert_allclose(got[0], [0.48, 1.05, 0, 0], atol=1e-6)
  assert (got[0, 2:] == 0).all()


def test_gradient_of_normalised_gates_reaches_only_the_chosen():
  got = gate_gradient(make(norm_topk_prob=True), [2.0, 5.0])
  # Token 0: g0 = 4/7, g1 = 3/7, sum w g = 23/7; d/dz_0 = g0 (2 - 23/7) = -36/49, d/dz_1 = +36/49.
  np.testing.assert_allclose(got[0], [-36 / 49, 36 / 49, 0, 0], atol=1e-6)


def test_gradient_of_a_renormalised_single_gate_vanishes_but_switch_keeps_one():
  # The reason why Switch uses the raw probability.
  assert np.abs(gate_gradient(make(k=1, norm_topk_prob=True), [1.0])).max() < 1e-6
  # Token 0: d p0 / dz = p0 (e0 - p) = .4 * (.6, -.3, -.2, -.1)
  want = [0.24, -0.12, -0.08, -0.04]
  np.testing.assert_allclose(gate_gradient(make(k=1), [1.0])[0], want, atol=1e-6)


def test_without_takes_masked_tokens_and_choices_out():
  decision = routing.Routing(
    jnp.array([[[0.4, 0.3], [0.45, 0.25], [0.5, 0.25]]]),
    jnp.array([[[0, 1], [3, 2], [1, 3]]]),
    jnp.asarray(PROBS),
  )
  out = routing.without(decision, jnp.array([[True, False, True]]))
  np.testing.assert_array_equal(out.expert_idx, [[[0, 1], [4, 4], [1, 3]]])  # E = 4: nowhere
  np.testing.assert_allclose(out.gates, [[[0.4, 0.3], [0, 0], [0.5, 0.25]]], **EXACT)
  np.testing.assert_array_equal(out.scores[0, 1], np.zeros(4))
  np.testing.assert_array_equal(out.scores[0, ::2], decision.scores[0, ::2])
  keep = jnp.array([[[True, False], [True, True], [False, False]]])
  out = routing.without_choices(decision, keep)
  np.testing.assert_array_equal(out.expert_idx, [[[0, 4], [3, 2], [4, 4]]])
  np.testing.assert_allclose(out.gates, [[[0.4, 0], [0.45, 0.25], [0, 0]]], **EXACT)
  np.testing.assert_array_equal(out.scores, decision.scores)
  assert out.expert_idx.dtype == jnp.int32


def test_masked_tokens_get_no_gradient():
  def loss(logits):
    scores = jax.nn.softmax(logits)
    inputs = routing.Inputs(scores, scores, tokens_of(1, 3), 0, {})
    decision = ROUTERS['topk'].route(inputs, make(), True)
    out = routing.without(decision, jnp.array([[True, False, True]]))
    return out.gates.sum() + (out.scores * jnp.arange(4)).sum()

  grad = np.asarray(tiny.jit(jax.grad(loss))(LOGITS))[0]
  assert (grad[1] == 0).all()
  assert (grad[[0, 2]] != 0).all()


# Hash.


def test_hash_reads_the_table_and_weighs_evenly():
  cfg = make(router='hash', routed_scaling_factor=3.0)
  table = np.array([[0, 1], [3, 2], [2, 0]], np.int32)
  tokens = tokens_of(1, 4, ids=[[1, 2, 1, 0]], mask=[[1, 1, 1, 0]])
  got = route(cfg, np.zeros((1, 4, 4)), tokens, state={'table': table})
  np.testing.assert_array_equal(got.expert_idx, [[[3, 2], [2, 0], [3, 2], [4, 4]]])
  np.testing.assert_allclose(got.gates, [[[1.5, 1.5]] * 3 + [[0, 0]]], **EXACT)  # 3 / K
  np.testing.assert_allclose(
    got.scores, [[[0, 0, 0.5, 0.5], [0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5], [0] * 4]], **EXACT
  )
  assert not ROUTERS['hash'].traits.has_logits


def test_random_table_has_different_experts_all_equally_likely():
  cfg = make(8, 3, router='hash')
  init = tiny.jit(lambda key: ROUTERS['hash'].init_state(cfg, routing.Sizes(4000, 16), key))
  table = np.asarray(init(jax.random.key(0))['table'])
  assert table.shape == (4000, 3) and table.dtype == np.int32
  assert all(len(set(row)) == 3 for row in table)
  # Binomial(4000, 3/8): 1500 +- 4 * sqrt(4000 * 3/8 * 5/8) = 122; the first choice: 500 +- 84.
  assert np.abs(np.bincount(table.ravel(), minlength=8) - 1500).max() < 122
  assert np.abs(np.bincount(table[:, 0], minlength=8) - 500).max() < 84
  assert (np.asarray(init(jax.random.key(1))['table']) != table).any()  # layers differ


# Expert choice. Two experts; the scores of expert 0 are written, expert 1 has the rest to 1.


def two_experts(first):
  first = np.asarray(first, np.float32)
  return np.log(np.stack([first, 1 - first], axis=-1))


def taken(cfg, first, **tokens):
  """Which experts take each token: list of rows of strings such as '01'; '' for none."""
  logits = two_experts(first)
  idx = np.asarray(route(cfg, logits, tokens_of(*logits.shape[:2], **tokens)).expert_idx)
  return [[''.join(str(i) for i in token if i < 2) for token in row] for row in idx.tolist()]


def ec(k=1, **options):
  return make(2, k, router='expert_choice', **{f'options__{n}': v for n, v in options.items()})


def test_every_expert_takes_its_best_tokens():
  # floor(K n / E) = floor(1 * 4 / 2) = 2 each. Expert 0: .9 and .8. Expert 1: .6 (.4) and .3 (.7).
  assert taken(ec(), [[0.9, 0.8, 0.7, 0.4]]) == [['0', '0', '1', '1']]
  logits = two_experts([[0.9, 0.55, 0.56, 0.54]])
  got = route(ec(), logits)
  # Expert 0: tokens 0 and 2; expert 1: tokens 3 (.46) and 1 (.45).
  np.testing.assert_array_equal(got.expert_idx[0], [[0, 2], [1, 2], [0, 2], [1, 2]])
  np.testing.assert_allclose(got.gates[0], [[0.9, 0], [0.45, 0], [0.56, 0], [0.46, 0]], **EXACT)


def test_a_token_is_taken_by_both_best_first_or_by_none():
  # Three tokens: floor(3 / 2) = 1 each.
  logits = np.array([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
  sigmoid = make(2, 1, router='expert_choice', score_func='sigmoid')
  np.testing.assert_array_equal(route(sigmoid, logits).expert_idx[0], [[0, 2], [1, 2], [2, 2]])
  both = route(sigmoid, np.array([[[2.0, 2.5], [0.0, 1.0], [1.0, 1.0]]]))
  np.testing.assert_array_equal(both.expert_idx[0], [[1, 0], [2, 2], [2, 2]])


def test_padding_is_not_taken_and_does_not_count():
  # Three real tokens: floor(3 / 2) = 1 each, although padding has the best scores.
  mask = [[1, 1, 1, 0, 0]]
  assert taken(ec(), [[0.6, 0.8, 0.3, 0.99, 0.01]], mask=mask) == [['', '0', '1', '', '']]
  # One token: floor(1 / 2) = 0, but at least 1. None: none.
  assert taken(ec(), [[0.6, 0.8, 0.9]], mask=[[1, 0, 0]]) == [['01', '', '']]
  assert taken(ec(), [[0.6, 0.8, 0.9]], mask=[[0, 0, 0]]) == [['', '', '']]


def test_chunks_compete_by_themselves():
  first = [[0.9, 0.8, 0.7, 0.4], [0.3, 0.2, 0.25, 0.1]]
  # Rows: 2 each. Row 1: expert 0 takes .3 and .25, expert 1 takes .2 and .1.
  assert taken(ec(), first) == [['0', '0', '1', '1'], ['0', '1', '0', '1']]
  # Half rows, 1 each: the better of two.
  assert taken(ec(chunk_tokens=2), first) == [['0', '1', '0', '1'], ['0', '1', '0', '1']]
  # Both rows, 4 each: expert 0 takes all of row 0.
  assert taken(ec(chunk_tokens=8), first) == [['0', '0', '0', '0'], ['1', '1', '1', '1']]
  # One token each: floor(1 / 2), at least 1: all of them twice.
  assert taken(ec(chunk_tokens=1), [[0.9, 0.2]]) == [['01', '10']]


def test_chunks_that_do_not_fit_are_refused_by_name():
  # 16 divides the 8 rows x 16 of the config's batch, but not what an evaluation may hand in.
  with pytest.raises(errors.InputError, match=r'chunk_tokens=16 must divide .* 2 rows x 4; choose'):
    taken(ec(chunk_tokens=16), np.full((2, 4), 0.5))


def test_shuffled_chunks_are_dealt_by_the_noise():
  cfg = ec(chunk_tokens=4, shuffle_chunks=True)
  first = np.random.default_rng(0).uniform(0.05, 0.95, size=(4, 6))
  seen = []
  for seed in range(3):
    tokens = tokens_of(4, 6, seed=seed)
    got = np.asarray(route(cfg, two_experts(first), tokens, layer=1).expert_idx).reshape(24, 2)
    deal = np.argsort(np.asarray(routing.token_noise(tokens, np.int32(1), salt=3)).ravel())
    want = np.full(24, -1)
    for chunk in deal.reshape(6, 4):
      best = chunk[np.argsort(-first.ravel()[chunk])]
      want[best[:2]], want[best[2:]] = 0, 1  # floor(4 / 2) each
    np.testing.assert_array_equal(got[:, 0], want)
    seen.append(got[:, 0])
  assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


# DS-MoE.


def ds_moe(rule, logits=LOGITS, train=False, mask=None, **overrides):
  cfg = make(router='ds_moe', options__inference=rule, **overrides)
  return route(cfg, logits, tokens_of(*logits.shape[:2], mask=mask), train=train)


@pytest.mark.parametrize('rule', moe_config.INFERENCE_RULES)
def test_training_weighs_every_expert_whatever_the_rule(rule):
  got = ds_moe(rule, train=True)
  np.testing.assert_array_equal(got.expert_idx, np.broadcast_to(np.arange(4), (1, 3, 4)))
  np.testing.assert_allclose(got.gates, PROBS, **EXACT)


@pytest.mark.parametrize(
  'rule, want',
  [
    ('all', [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]),
    # 4 * score > .9: score > .225.
    ('threshold', [[0, 1, 4, 4], [4, 4, 2, 3], [4, 1, 4, 3]]),
    # K = 1: the best.
    ('topk', [[0, 4, 4, 4], [4, 4, 4, 3], [4, 1, 4, 4]]),
    # Three best (token, expert) pairs of three tokens: .5, .45, .4.
    ('threshold_topk', [[0, 4, 4, 4], [4, 4, 4, 3], [4, 1, 4, 4]]),
  ],
)
def test_inference_rules_by_hand(rule, want):
  got = ds_moe(rule, num_experts_per_tok=1, options__inference_threshold=0.9)
  np.testing.assert_array_equal(got.expert_idx[0], want)
  # Not renormalised.
  np.testing.assert_allclose(got.gates[0], np.where(np.array(want) < 4, PROBS[0], 0), **EXACT)


def test_threshold_topk_is_a_budget_of_the_batch_and_not_of_a_token():
  # K = 2 of three tokens, the last padding: the 4 best pairs of two tokens, .4 .3 and .45 .25.
  probs = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45], [0.97, 0.01, 0.01, 0.01]]])
  got = ds_moe('threshold_topk', np.log(probs), mask=[[1, 1, 0]])
  np.testing.assert_array_equal(got.expert_idx[0], [[0, 1, 4, 4], [4, 4, 2, 3], [4] * 4])
  # The same real token twice as sure takes one of the other's: .7 .29, .45 .25 -> K = 1.5 ...
  probs[0, 0] = [0.5, 0.3, 0.19, 0.01]
  probs[0, 1] = [0.29, 0.24, 0.24, 0.23]
  got = ds_moe('threshold_topk', np.log(probs), mask=[[1, 1, 0]])
  # .5 .3 .29 and one of the two .24: a tie takes both.
  np.testing.assert_array_equal(got.expert_idx[0], [[0, 1, 4, 4], [0, 1, 2, 4], [4] * 4])


def test_topk_rule_breaks_ties_like_topk():
  got = ds_moe('topk', np.zeros((1, 1, 4)))
  np.testing.assert_array_equal(got.expert_idx, [[[0, 1, 4, 4]]])


# Routers that do not read.


def test_sinkhorn_balances_in_training_only():
  probs = np.array([[[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]])
  cfg = make(2, 1, router='sinkhorn')
  plain = route(cfg, np.log(probs), train=False)
  np.testing.assert_array_equal(plain.expert_idx[0, :, 0], [0, 0, 0, 0])
  # Columns sum to 2.8 and 1.2: (.321, .083), (.286, .167), (.214, .333), (.179, .417); rows to 1:
  # (.794, .206), (.632, .368), (.391, .609), (.300, .700). Further rounds keep the order.
  got = route(cfg, np.log(probs))
  np.testing.assert_array_equal(got.expert_idx[0, :, 0], [0, 0, 1, 1])
  np.testing.assert_allclose(got.gates[0, :, 0], [0.9, 0.8, 0.4, 0.5], **EXACT)
  # Without the last token, columns sum to 2.3 and .7: rows (.732, .268), (.549, .451),
  # (.313, .687); padding weighs nothing and goes nowhere.
  padded = tokens_of(1, 4, mask=[[1, 1, 1, 0]])
  got = route(cfg, np.log(probs), padded)
  np.testing.assert_array_equal(got.expert_idx[0, :, 0], [0, 0, 1, 2])


def test_balanced_deals_in_turn():
  # Two rows of 3 tokens, E = 5, K = 2; row 1 starts where row 0 ended.
  got = route(make(5, router='balanced'), np.zeros((2, 3, 5)))
  want = [[[0, 1], [2, 3], [4, 0]], [[1, 2], [3, 4], [0, 1]]]
  np.testing.assert_array_equal(got.expert_idx, want)
  np.testing.assert_allclose(got.gates, np.full((2, 3, 2), 0.2), **EXACT)  # their own scores


@pytest.mark.parametrize('e, k', [(8, 2), (5, 3), (7, 7)])
def test_balanced_is_balanced(e, k):
  idx = np.asarray(route(make(e, k, router='balanced'), np.zeros((4, 9, e))).expert_idx)
  load = np.bincount(idx.ravel(), minlength=e)
  assert load.sum() == 36 * k and load.max() - load.min() <= 1
  assert all(len(set(token)) == k for token in idx.reshape(-1, k).tolist())


@pytest.mark.parametrize('skew', [0.0, 0.3, 1.0])
def test_skewed_gives_expert_0_its_share(skew):
  cfg = make(5, 3, router='skewed', options__skew=skew)
  idx = np.asarray(route(cfg, np.zeros((40, 100, 5))).expert_idx).reshape(-1, 3)
  share = (idx[:, 0] == 0).mean()
  assert share == skew if skew in (0, 1) else abs(share - skew) < 4 * np.sqrt(0.3 * 0.7 / 4000)
  assert (idx[:, 1:] > 0).all()  # nobody else goes there
  assert all(len(set(token)) == 3 for token in idx.tolist())
  load = np.bincount(idx.ravel(), minlength=5)[1:]
  assert load.max() - load.min() < 0.05 * load.mean()  # the others are dealt evenly


def test_replay_reads_its_rows():
  cfg = make(router='replay', options__replay_path='x', options__replay_rows=2)
  # Two recorded rows of 4 places; choice 4 is nowhere.
  recorded = np.array(
    [[[0, 1], [3, 4], [2, 1], [0, 3]], [[1, 2], [4, 4], [3, 0], [0, 1]]], np.int32
  )
  tokens = tokens_of(3, 3, row=[1, 2, 5], mask=[[1, 1, 1], [1, 1, 0], [1, 1, 1]])
  got = route(cfg, np.tile(LOGITS, (3, 1, 1)), tokens, state={'assignments': recorded})
  # Rows 1 and 5 read row 1, row 2 reads row 0; places 0 to 2.
  np.testing.assert_array_equal(got.expert_idx[0], recorded[1, :3])
  np.testing.assert_array_equal(got.expert_idx[1], [[0, 1], [3, 4], [4, 4]])
  np.testing.assert_array_equal(got.expert_idx[2], recorded[1, :3])
  # Gates are today's scores: token 0 experts 1 and 2, token 1 none, token 2 experts 3 and 0.
  np.testing.assert_allclose(got.gates[0], [[0.3, 0.2], [0, 0], [0.25, 0.125]], **EXACT)


def test_replay_starts_nowhere():
  cfg = make(router='replay', options__replay_path='x', options__replay_rows=2)
  state = ROUTERS['replay'].init_state(cfg, routing.Sizes(32, 5), None)
  np.testing.assert_array_equal(state['assignments'], np.full((2, 5, 2), 4))


# GShard's second expert.


@functools.partial(tiny.jit, static_argnums=0)
def kept_second(cfg, gates, seed):
  decision = routing.Routing(gates, jnp.zeros(gates.shape, jnp.int32), None)
  tokens = tokens_of(*gates.shape[:2])._replace(seed=seed)
  return gshard.keeps_second(cfg, decision, tokens, jnp.int32(0))


@pytest.mark.parametrize('factor', [1.0, 2.5])
def test_second_expert_is_kept_with_probability_twice_its_gate(factor):
  n = 10_000  # per gate
  second = np.array([0.0, 0.1, 0.25, 0.4, 0.5, 0.7], np.float32)
  gates = np.stack([1 - second, second], axis=-1)[:, None].repeat(n, 1) * np.float32(factor)
  kept = np.asarray(kept_second(make(routed_scaling_factor=factor), gates, np.uint32(0)))
  assert kept[..., 0].all()
  share, want = kept[..., 1].mean(1), np.minimum(1, 2 * second)
  # Binomial: four standard deviations; exactly 0 and 1 at the ends.
  assert (np.abs(share - want) <= 4 * np.sqrt(want * (1 - want) / n)).all()
  again = np.asarray(kept_second(make(routed_scaling_factor=factor), gates, np.uint32(1)))
  # Drawn anew each step: on average 2 p (1 - p) = (.32 + .5 + .32) / 6 = .19 differ.
  assert (again != kept)[..., 1].mean() == pytest.approx(0.19, abs=0.01)


def test_a_router_from_outside():
  """Its name is refused before it is registered, and never replaces one of the library."""

  def route(inputs, cfg, train):
    expert_idx = routing.keep_best(-inputs.selection, cfg.num_experts_per_tok)
    gates = routing.gates_of(inputs.scores, expert_idx, cfg)
    return routing.Routing(gates, expert_idx, inputs.scores)

  traits = router_traits.RouterTraits(causal=True)
  with pytest.raises(errors.InputError, match='model.moe.router'):
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
