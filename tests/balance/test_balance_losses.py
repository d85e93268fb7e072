"""Every balance loss by hand, then what must hold for any batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import balance_losses, router_stats
from moe_jax.config import moe_config
from tests.balance import routed

CFG_B = routed.make(5, 2, 3, score_func='sigmoid')


BY_HAND_A = {
  # f = E / (K T) load = 4 / 6 (2, 2, 0, 2) = 4/3 (1, 1, 0, 1); P = (1, .65, .5, .85) / 3
  'expert_level': 4 / 3 * (1 + 0.65 + 0.85) / 3,
  # f' = (4/3, 2/3), P' = (1.65, 1.35) / 3
  'device_level': (4 / 3 * 1.65 + 2 / 3 * 1.35) / 3,
  # f'' = D / (M T) sent = 2 / (2 * 3) (3, 2) = (1, 2/3), M = min(K, D) = 2
  'communication': (1 * 1.65 + 2 / 3 * 1.35) / 3,
  # E (2/3 * 1/3 + 1/3 * .85/3)
  'switch': 4 * (2 / 3 * 1 / 3 + 1 / 3 * 0.85 / 3),
  'gshard': 4 * (2 / 3 * 1 / 3 + 1 / 3 * 0.85 / 3) / 16,
  # P - 1/4 = (1 - .75, .65 - .75, .5 - .75, .85 - .75) / 3 = (.25, -.1, -.25, .1) / 3
  'squared_deviation': (0.0625 + 0.01 + 0.0625 + 0.01) / 9,
  'normalized_expert_level': 4 / 3 * 2.5 / 3,
  'router_z': (1 + 4 + 1) / 3,
}
BY_HAND_B = {
  # f = 5 / (2 * 4) load = (1.25, .625, 1.25, .625, 1.25); P = score / 4
  'expert_level': (1.25 * (1.6 + 1.1 + 0.9) + 0.625 * (1.7 + 1.2)) / 4,
  # f' = means of f over {0, 1}, {2, 3}, {4} = (.9375, .9375, 1.25), P' = (3.3, 2.3, .9) / 4
  'device_level': (0.9375 * (3.3 + 2.3) + 1.25 * 0.9) / 4,
  # f'' = 3 / (2 * 4) (2, 3, 2), M = min(K, D) = 2
  'communication': (0.75 * 3.3 + 1.125 * 2.3 + 0.75 * 0.9) / 4,
  # 5 (1/4 * 1.6/4 + 1/4 * 1.7/4 + 2/4 * 1.1/4)
  'switch': 5 * (1.6 + 1.7 + 2 * 1.1) / 16,
  'gshard': (1.6 + 1.7 + 2 * 1.1) / 16 / 5,
  # P - 1/5 = (.4, .425, .275, .3, .225) - .2 = (.2, .225, .075, .1, .025)
  'squared_deviation': 0.04 + 0.050625 + 0.005625 + 0.01 + 0.000625,
  # f prob / 4
  'normalized_expert_level': (1.25 * (0.9 + 0.7 + 0.5) + 0.625 * (1.2 + 0.7)) / 4,
}


@pytest.mark.parametrize('name', balance_losses.LOSSES)
def test_loss_of_three_tokens_by_hand(name):
  if name != 'mutual_information':
    got = routed.losses_of(routed.case_a(), routed.make())[name]
    np.testing.assert_allclose(got, [BY_HAND_A[name]], **routed.EXACT)


@pytest.mark.parametrize('name', BY_HAND_B)
def test_loss_of_four_tokens_with_sigmoid_scores_and_an_uneven_last_device_by_hand(name):
  np.testing.assert_allclose(
    routed.losses_of(routed.case_b(), CFG_B)[name], [BY_HAND_B[name]], **routed.EXACT
  )


def test_communication_counts_on_the_device_limit():
  # Case A with K = 3 experts per token: M = min(K, D) = 2 as before, and not 3; with one of two
  # groups per token M = 1, which doubles f'' = D / (M T) sent.
  def value(cfg):
    return float(routed.losses_of(routed.case_a(), cfg)['communication'][0])

  assert value(routed.make(4, 3, 2)) == pytest.approx(BY_HAND_A['communication'], rel=1e-6)
  limited = routed.make(num_expert_groups=2, num_limited_groups=1)
  assert value(limited) == pytest.approx(2 * BY_HAND_A['communication'], rel=1e-6)


def test_mutual_information_of_four_tokens_by_hand():
  prob = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], np.float32)
  sums = routed.sums_of(np.zeros((1, 4, 1), np.int32), prob[None], None, np.ones((1, 4), bool), 2)
  # Mean prob (7, 7, 1, 1) / 16: H = 7/8 ln(16/7) + 1/8 ln 16 = ln 16 - 7/8 ln 7.
  # Mean of H: (0 + 0 + ln 2 + ln 4) / 4 = 3/4 ln 2.
  want = -(math.log(16) - 7 / 8 * math.log(7)) + 3 / 4 * math.log(2)
  np.testing.assert_allclose(
    routed.losses_of(sums, routed.make())['mutual_information'], [want], **routed.EXACT
  )
  np.testing.assert_array_equal(sums.squared_log_z, [0])  # a router without logits


def test_entropy_by_hand_and_without_a_gradient_at_0():
  prob = jnp.array([0.5, 0.25, 0.25, 0.0])
  # .5 ln 2 + 2 * .25 ln 4 = 1.5 ln 2
  assert float(router_stats.entropy(prob)) == pytest.approx(1.5 * math.log(2), rel=1e-6)
  # d/dp (-p ln p) = -ln p - 1: ln 2 - 1, ln 4 - 1 twice, and 0 where it has no end
  want = [math.log(2) - 1, math.log(4) - 1, math.log(4) - 1, 0]
  np.testing.assert_allclose(jax.grad(router_stats.entropy)(prob), want, **routed.EXACT)


def test_everybody_on_the_same_experts_costs_experts_over_experts_per_token():
  """DeepSeekMoE 2B: 63 routed experts, 7 of them active, 1/7 on each: N' / K' = 9."""
  scores = np.zeros((1, 5, 63), np.float32)
  scores[..., :7] = 1 / 7
  idx = np.tile(np.arange(7, dtype=np.int32), (1, 5, 1))
  cfg = routed.make(63, 7, 9)
  got = routed.losses_of(routed.sums_of(idx, scores, None, np.ones((1, 5), bool), 9), cfg)
  np.testing.assert_allclose(got['expert_level'], [63 / 7], **routed.EXACT)
  # All on the first of 9 devices: f' = 63 / 7 * 5 * 7 / (5 * 7) = 9, P' = 1.
  np.testing.assert_allclose(got['device_level'], [9], **routed.EXACT)


def test_frequency_of_a_huge_batch_does_not_overflow():
  """20M tokens on one of 160 experts: E * load = 3.2e9 is more than an int32 holds."""
  load = np.zeros((1, 160), np.int32)
  load[0, 3] = 20_000_000
  sums = routed.case_a()._replace(
    num_tokens=np.int32([20_000_000]), load=load, score=load.astype(np.float32)
  )
  got = balance_losses.expert_level(sums, routed.make(160, 1, 1))
  np.testing.assert_allclose(got, [160], **routed.EXACT)


def balanced_sums(name, cfg):
  """E tokens, token t on experts t, t + 1, ... and each score the mean: perfect balance.

  Neighbours are one device apart (D = E), so that each token uses K devices.
  """
  e, k = cfg.num_experts, cfg.num_experts_per_tok
  idx = (np.arange(e)[:, None] + np.arange(k)) % e
  prob = np.arange(e, 0, -1) / np.arange(e + 1).sum()  # falling, of sum 1
  logits = np.zeros((e, e))
  if cfg.score_func == 'sigmoid':
    prob = prob * e / 2  # mean 1/2, which is the score of logit 0
  if name == 'mutual_information':
    prob = np.eye(e)[0]
  scores = np.stack([np.roll(prob, t) for t in range(e)]).astype(np.float32)
  arrays = (idx.astype(np.int32), scores, logits.astype(np.float32), np.ones(e, bool))
  return routed.sums_of(*(a[None] for a in arrays), cfg.num_virtual_devices)


@pytest.mark.parametrize('score_func', moe_config.SCORE_FUNCS)
@pytest.mark.parametrize('name', balance_losses.LOSSES)
def test_value_at_perfect_balance(name, score_func):
  cfg = routed.make(8, 2, 8, score_func=score_func)
  want = balance_losses.value_at_balance(name, cfg)
  got = routed.losses_of(balanced_sums(name, cfg), cfg)[name]
  np.testing.assert_allclose(got, [want], rtol=1e-5, atol=1e-6)  # squared deviation: a true 0


def test_declared_values_by_hand():
  def values(cfg):
    return {name: balance_losses.value_at_balance(name, cfg) for name in balance_losses.LOSSES}

  # E = 8: softmax scores sum to 1, sigmoid scores to 4; 4^2: (4 - 1)^2 / 8; ln 8 = 2.0794.
  np.testing.assert_allclose(
    list(values(routed.make(8)).values()),
    [1, 1, 1, 1, 1 / 64, 0, 1, -2.0794415, 4.3240771],
    rtol=1e-6,
  )
  sigmoid = values(routed.make(8, score_func='sigmoid'))
  assert [sigmoid[name] for name in ('expert_level', 'device_level', 'switch')] == [4, 4, 4]
  assert (sigmoid['gshard'], sigmoid['squared_deviation']) == (4 / 64, 9 / 8)
  assert sigmoid['normalized_expert_level'] == 1


@pytest.mark.parametrize(
  'k, d, groups, limit, want',
  [
    (6, 8, 8, 3, 3),  # DeepSeek-V2: its limit
    (6, 8, 1, 1, 6),  # no limit: as many as experts
    (6, 4, 1, 1, 4),  # but no more than devices
    (6, 4, 8, 3, 4),  # groups that are not the devices limit nothing
    (2, 8, 8, 3, 2),
  ],
)
def test_device_limit(k, d, groups, limit, want):
  cfg = routed.make(
    16, k, d, num_expert_groups=groups, num_limited_groups=limit if groups > 1 else 0
  )
  assert balance_losses.device_limit(cfg) == want


def test_padding_is_never_counted():
  logits = np.random.default_rng(2).normal(size=(routed.B, routed.L, routed.E)).astype(np.float32)
  filled = np.where(routed.REAL[..., None], logits, 9.0)
  jax.tree.map(
    np.testing.assert_array_equal, routed.compiled_rows_of(filled), routed.compiled_rows_of(logits)
  )
  # Case A without its padding place is case A.
  row = (
    routed.IDX_A,
    routed.P_A.astype(np.float32),
    routed.LOGITS_A.astype(np.float32),
    np.ones(4, bool),
  )
  alone = routed.sums_of(*(a[None, :3] for a in row), 2)
  for name, got, want in zip(alone._fields, routed.case_a(), alone):
    np.testing.assert_allclose(got, want, **routed.EXACT, err_msg=name)


def test_an_empty_set_of_tokens_costs_nothing_and_stays_finite():
  sums = jax.tree.map(lambda a: jnp.zeros_like(a), routed.case_a())
  for name, value in routed.losses_of(sums, routed.make()).items():
    np.testing.assert_array_equal(value, [0.0], err_msg=name)
  assert float(router_stats.max_vio(sums.load)[0]) == 0


# Experts of one device among themselves, and devices 0 and 1 (2 experts each) with each other.
WITHIN = np.array([2, 3, 1, 0, 4])


def test_experts_have_no_names():
  """Any order of the experts gives the same losses, and moves their loads along."""
  logits = np.random.default_rng(3).normal(size=(routed.B, routed.L, routed.E)).astype(np.float32)
  before, after = (
    routed.compiled_rows_of(logits)[0],
    routed.compiled_rows_of(logits[..., WITHIN])[0],
  )
  np.testing.assert_array_equal(after.load, before.load[:, WITHIN])
  np.testing.assert_array_equal(after.first_load, before.first_load[:, WITHIN])
  np.testing.assert_array_equal(after.sent, before.sent[:, [1, 0, 2]])
  cfg = routed.make(routed.E, 2, 3)
  want, got = routed.losses_of(before, cfg), routed.losses_of(after, cfg)
  for name in balance_losses.LOSSES:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('concentration', [0.01, 0.1, 1.0, 10.0])
def test_mutual_information_loss_lies_between_minus_ln_e_and_0(concentration):
  prob = np.random.default_rng(0).dirichlet(np.full(routed.E, concentration), size=(50, 4))
  idx = np.zeros((50, 4, 1), np.int32)
  sums = routed.sums_of(idx, prob.astype(np.float32), None, np.ones((50, 4), bool), 1)
  got = np.asarray(routed.losses_of(sums, routed.make(routed.E, 2, 1))['mutual_information'])
  assert (got >= -math.log(routed.E) - 1e-5).all() and (got <= 1e-5).all()
  assert got.std() > 1e-3  # it says something
  # The same prob for every token, certain or not: token and expert share no information.
  same = np.tile(prob[:, :1], (1, 4, 1)).astype(np.float32)
  got = routed.losses_of(
    routed.sums_of(idx, same, None, np.ones((50, 4), bool), 1), routed.make(routed.E, 2, 1)
  )
  np.testing.assert_allclose(got['mutual_information'], 0, atol=1e-5)
