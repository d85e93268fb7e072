"""From the router's input to selection scores: jitter, normalisation, bias and groups, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import integer_hash
from moe_jax.config import moe_config
from moe_jax.models.routers import ROUTERS, routing, scoring
from tests import tiny

PROBS = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45], [0.125, 0.5, 0.125, 0.25]]])
LOGITS = np.log(PROBS / (1 - PROBS))  # whose sigmoid gives the numbers back; [B=1, L=3, E=4]
EXACT = dict(rtol=1e-6)  # float32 exp and log are good to a few units in the last place


@functools.cache
def make(e=4, k=2, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig`."""
  values = {'num_experts': e, 'num_experts_per_tok': k} | overrides
  return tiny.make(**{f'model__moe__{key}': v for key, v in values.items()}).model.moe


def tokens_of(b, length, row=None, seed=0) -> routing.Tokens:
  row = np.arange(b, dtype=np.int32) if row is None else np.asarray(row, np.int32)
  zeros = np.zeros((b, length), np.int32)
  return routing.Tokens(zeros, zeros == 0, row, np.uint32(seed))


@functools.partial(tiny.jit, static_argnums=0)
def _choose(cfg, logits, state):
  scores = scoring.SCORE_FUNCS[cfg.score_func](logits)
  selection = scoring.selection(scores, state, cfg)
  inputs = routing.Inputs(scores, selection, tokens_of(*logits.shape[:2]), jnp.int32(0), state)
  return ROUTERS['topk'].route(inputs, cfg, True)


def choose(cfg, logits, bias=None) -> routing.Routing:
  """Scores, selection and top-k of logits."""
  state = {} if bias is None else {'expert_bias': np.asarray(bias, np.float32)}
  return _choose(cfg, np.asarray(logits, np.float32), state)


# Bias: who is chosen, and nothing else.

LOSS_FREE = {'score_func': 'sigmoid', 'expert_bias__update_rule': 'sign'}
MULTIPLICATIVE = LOSS_FREE | {'expert_bias__form': 'multiplicative'}


def test_bias_selects_and_never_weighs():
  # Token 0: .4 .3 .2 .1 plus (-.3, 0, 0, .25) = .1 .3 .2 .35: experts 3 and 1, weights .1 and .3.
  # Token 1: .1 .2 .25 .45 -> -.2 .2 .25 .7: 3 and 2. Token 2: .125 .5 .125 .25 -> 1 (.5), 3 (.5).
  bias = np.float32([-0.3, 0, 0, 0.2501])
  got = choose(make(**LOSS_FREE), LOGITS, bias)
  np.testing.assert_array_equal(got.expert_idx, [[[3, 1], [3, 2], [3, 1]]])
  np.testing.assert_allclose(got.gates, [[[0.1, 0.3], [0.45, 0.25], [0.25, 0.5]]], **EXACT)
  np.testing.assert_allclose(got.scores, PROBS, **EXACT)


def test_multiplicative_bias():
  # Times (1, 1, 3, .6). Token 0: .4 .3 .6 .06; 1: .1 .2 .75 .27; 2: .125 .5 .375 .15.
  bias = np.float32([1, 1, 3, 0.6])
  got = choose(make(**MULTIPLICATIVE), LOGITS, bias)
  np.testing.assert_array_equal(got.expert_idx, [[[2, 0], [2, 3], [1, 2]]])
  np.testing.assert_allclose(got.gates, [[[0.2, 0.4], [0.25, 0.45], [0.5, 0.125]]], **EXACT)


def test_a_common_bias_changes_nothing():
  logits = np.random.default_rng(0).normal(size=(2, 16, 8))
  cfg = make(8, 3, **LOSS_FREE)
  bias = np.random.default_rng(1).normal(size=8).astype(np.float32) * 0.1
  want = choose(cfg, logits, bias)
  got = choose(cfg, logits, bias + 0.5)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  without = choose(cfg, logits, np.zeros(8))
  assert (np.asarray(without.expert_idx) != want.expert_idx).any()  # the bias did something


def test_bias_gets_no_gradient():
  cfg = make(norm_topk_prob=True, **LOSS_FREE)

  def loss(bias):
    scores = jax.nn.sigmoid(LOGITS)
    selection = scoring.selection(scores, {'expert_bias': bias}, cfg)
    inputs = routing.Inputs(scores, selection, tokens_of(1, 3), 0, {})
    out = ROUTERS['topk'].route(inputs, cfg, True)
    return (out.gates * jnp.array([2.0, 5.0])).sum() + selection.sum()

  np.testing.assert_array_equal(tiny.jit(jax.grad(loss))(jnp.full(4, 0.1)), np.zeros(4))


# Groups (device-limited routing).


def limited(scores, **overrides):
  scores = np.asarray(scores, np.float32)[None, None]
  cfg = make(scores.shape[-1], **overrides)
  return np.asarray(tiny.jit(lambda s: scoring.limit_groups(s, cfg))(scores))[0, 0]


NONE = -np.inf
GROUPS = {'num_expert_groups': 3, 'num_limited_groups': 1}


@pytest.mark.parametrize(
  'group_score, limit, want',
  [
    # Groups {.5, .1}, {.3, .35}, {.2, .4}. Best: .5, .35, .4.
    ('max', 1, [0.5, 0.1, NONE, NONE, NONE, NONE]),
    ('max', 2, [0.5, 0.1, NONE, NONE, 0.2, 0.4]),
    # Sums of the best two: .6, .65, .6.
    ('top2_sum', 1, [NONE, NONE, 0.3, 0.35, NONE, NONE]),
    # .6 is a tie up to rounding, so one group is a little better: {.2, .41}.
    ('top2_sum', 2, [NONE, NONE, 0.3, 0.35, 0.2, 0.41]),
    ('max', 3, [0.5, 0.1, 0.3, 0.35, 0.2, 0.4]),
  ],
)
def test_best_groups_by_hand(group_score, limit, want):
  scores = [0.5, 0.1, 0.3, 0.35, 0.2, 0.41 if 0.41 in want else 0.4]
  groups = {'num_expert_groups': 3, 'num_limited_groups': limit, 'group_score': group_score}
  got = limited(scores, **groups)
  np.testing.assert_array_equal(got, np.float32(want))


def test_best_two_of_a_group_of_four_are_not_all_of_it():
  # Sums of two: .4 + .3, .5 + .1; sums of all would be .7 + 0, .6 + .2.
  scores = [0.4, 0.3, 0.0, 0.0, 0.5, 0.1, 0.1, 0.1]
  groups = {'num_expert_groups': 2, 'num_limited_groups': 1, 'group_score': 'top2_sum'}
  np.testing.assert_array_equal(limited(scores, **groups)[4:], [NONE] * 4)


@pytest.mark.parametrize('group_score', moe_config.GROUP_SCORES)
def test_uneven_last_group(group_score):
  # {.1, .2}, {.3, .1}, {.6}: the single expert counts once, .6 against .3 or .4.
  groups = GROUPS | {'group_score': group_score, 'num_experts_per_tok': 1}
  got = limited([0.1, 0.2, 0.3, 0.1, 0.6], **groups)
  np.testing.assert_array_equal(got, np.float32([NONE, NONE, NONE, NONE, 0.6]))


@pytest.mark.parametrize('group_score', moe_config.GROUP_SCORES)
def test_negative_biases_cannot_resurrect_a_masked_group(group_score):
  """Masking with 0, as for unbiased softmax scores, would prefer a masked group to a negative one.

  Biased scores -.1 -.2 | -.3 -.4 | -.5 -.6: the first group is the best by any rule.
  """
  cfg = make(6, group_score=group_score, **GROUPS, **LOSS_FREE)
  bias = [-0.6, -0.7, -0.8, -0.9, -1.0, -1.1]
  got = choose(cfg, np.zeros((1, 1, 6)), bias)  # every score is .5
  np.testing.assert_array_equal(got.expert_idx, [[[0, 1]]])
  np.testing.assert_allclose(got.gates, [[[0.5, 0.5]]], **EXACT)


def test_limited_choice_stays_inside_its_groups():
  cfg = make(8, 3, num_expert_groups=4, num_limited_groups=2)
  logits = np.random.default_rng(0).normal(size=(1, 64, 8))
  got = np.asarray(choose(cfg, logits).expert_idx)[0]
  groups = [len(set(row // 2)) for row in got]
  assert max(groups) == 2
  free = np.asarray(choose(make(8, 3), logits).expert_idx)[0]
  assert max(len(set(row // 2)) for row in free) == 3  # without the limit


# Jitter and logit normalisation.


def test_jitter_is_uniform_around_1():
  tokens = tokens_of(16, 64)
  fn = tiny.jit(lambda x: scoring.jitter(x, tokens, np.int32(0), 0.1))
  got = np.asarray(fn(np.ones((16, 64, 16), np.float32)))
  n = got.size
  assert 0.9 <= got.min() < 0.9005 and 1.0995 < got.max() <= 1.1
  # Standard deviation of the mean: .1 / sqrt(3 n); four of them.
  assert abs(got.mean() - 1) < 4 * 0.1 / np.sqrt(3 * n)
  assert got.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
  assert len(np.unique(got)) > 0.99 * n  # per element, not per token: 16384 of 2^24 values
  np.testing.assert_allclose(fn(np.full((16, 64, 16), -3, np.float32)), -3 * got, **EXACT)


def noise(row=(0, 1), length=4, seed=0, layer=0, salt=1):
  tokens = tokens_of(len(row), length, row=row, seed=seed)
  return np.asarray(routing.token_noise(tokens, np.int32(layer), salt))


def test_noise_is_a_function_of_seed_layer_salt_row_and_place():
  np.testing.assert_array_equal(noise(), noise())
  seen = [noise(seed=s, layer=n, salt=t) for s in range(3) for n in range(3) for t in range(3)]
  assert len(np.unique(seen)) == 27 * 2 * 4  # all different
  # Row 7 of a batch is the same row wherever it stands in a micro-batch, whatever its length.
  np.testing.assert_array_equal(noise(row=(7, 3))[0], noise(row=(1, 7), length=6)[1, :4])


def normalised(logits, scale):
  fn = tiny.jit(lambda z: scoring.normalise_logits(z, scale))
  return np.asarray(fn(np.asarray(logits, np.float32)))


def test_normalised_logits_by_hand():
  # Mean 4, deviations -3 -1 1 3, population std sqrt(20 / 4) = sqrt 5; lambda 2.
  want = 2 * np.array([-3, -1, 1, 3]) / np.sqrt(5)
  np.testing.assert_allclose(normalised([[1, 3, 5, 7]], 2.0), [want], rtol=1e-5)


def test_normalised_logits_have_mean_0_and_std_lambda_whatever_their_scale():
  logits = np.random.default_rng(0).normal(size=(3, 5, 16))
  got = normalised(logits, 0.5)
  np.testing.assert_allclose(got.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(got.std(-1), 0.5, rtol=1e-5)
  # a z + b with a > 0; float32 cancels b = 3 to 1e-6.
  np.testing.assert_allclose(normalised(7 * logits + 3, 0.5), got, atol=2e-5)
  np.testing.assert_allclose(normalised(-logits, 0.5), -got, atol=1e-6)


def test_gradient_of_normalised_logits():
  def grad(z):
    return jax.grad(lambda z: (scoring.normalise_logits(z, 1.0) ** 3).sum())(z)

  grad = tiny.jit(grad)
  got = grad(jnp.array([[1.0, 3.0, 5.0, 9.0]]))
  assert np.abs(got).max() > 0.1
  # Invariance to shift and scale: the gradient is orthogonal to (1, 1, 1, 1) and to z.
  np.testing.assert_allclose(
    [got.sum(), (got * jnp.array([1.0, 3.0, 5.0, 9.0])).sum()], 0, atol=1e-5
  )
  assert np.isfinite(grad(jnp.full((1, 4), 0.7))).all()  # equal logits: std 0


def test_jitter_second_choice_and_shuffle_draw_different_numbers():
  values = [integer_hash.uniform(noise(salt=salt, length=500)) for salt in (1, 2, 3, 4)]
  # Correlation of 1000 independent pairs: 1 / sqrt(1000) = .03; four of them.
  off = np.corrcoef(np.stack([np.asarray(v).ravel() for v in values])) - np.eye(4)
  assert np.abs(off).max() < 0.13
