"""Every balance loss by hand, then what must hold for any batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import balance_losses, loss_scopes, router_stats
from moe_jax.config import moe_config
from tests import tiny

EXACT = dict(rtol=2e-6)  # a few float32 roundings


@functools.cache
def make(e=4, k=2, d=2, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig` with E experts, K per token and D virtual devices."""
  sizes = {'num_experts': e, 'num_experts_per_tok': k, 'num_virtual_devices': d}
  return tiny.make(**{f'model__moe__{key}': v for key, v in (sizes | overrides).items()}).model.moe


@functools.partial(tiny.jit, static_argnums=4)
def sums_of(expert_idx, scores, logits, mask, num_devices):
  return router_stats.sequence_sums(expert_idx, scores, logits, mask, num_devices)


@functools.partial(tiny.jit, static_argnums=1)
def losses_of(sums, cfg):
  return {name: fn(sums, cfg) for name, fn in balance_losses.LOSSES.items()}


# Case A. One row of three tokens and a padding place; E = 4, K = 2, D = 2 devices of 2 experts;
# softmax scores, logits ln p + c with c = 1, 2, -1.
#   load  (2, 2, 0, 2), first choices (2, 0, 0, 1), sums of scores (1.0, .65, .5, .85)
#   tokens sent: the first to device 0 only, the others to both: (3, 2)
P_A = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.25, 0.15, 0.5], [0.5, 0.1, 0.15, 0.25], [0] * 4])
IDX_A = np.array([[0, 1], [3, 1], [0, 3], [4, 4]], np.int32)
C_A = np.array([1.0, 2.0, -1.0, 0.0])
LOGITS_A = np.log(np.where(P_A > 0, P_A, 1)) + C_A[:, None]
# Case B. Four tokens; E = 5 experts on D = 3 devices: {0, 1}, {2, 3}, {4}; K = 2; sigmoid scores,
# whose sums are 2, 1, 2.5 and 1. The bias has moved choices away from the best scores.
#   load  (2, 1, 2, 1, 2), first choices (by score; a tie goes to the first) (1, 1, 2, 0, 0)
#   sums of scores (1.6, 1.7, 1.1, 1.2, .9), sent: {0, 1}, {0}, {1, 2}, {1, 2}: (2, 3, 2)
S_B = np.array(
  [
    [0.8, 0.4, 0.2, 0.4, 0.2],
    [0.2, 0.6, 0.1, 0.1, 0.0],
    [0.5, 0.5, 0.5, 0.5, 0.5],
    [0.1, 0.2, 0.3, 0.2, 0.2],
  ]
)
IDX_B = np.array([[0, 3], [1, 0], [4, 2], [4, 2]], np.int32)
CFG_B = make(5, 2, 3, score_func='sigmoid')


@functools.cache
def case_a():
  row = (IDX_A, P_A.astype(np.float32), LOGITS_A.astype(np.float32), np.arange(4) < 3)
  return sums_of(*(a[None] for a in row), 2)


@functools.cache
def case_b():
  # Only these logits have these scores, so that router_z is whatever they say.
  logits = np.log(np.maximum(S_B, 1e-6) / (1 - S_B))
  row = (IDX_B, S_B.astype(np.float32), logits.astype(np.float32), np.ones(4, bool))
  return sums_of(*(a[None] for a in row), 3)


def test_sums_by_hand():
  got = case_a()
  np.testing.assert_array_equal(got.num_tokens, [3])
  np.testing.assert_array_equal(got.load, [[2, 2, 0, 2]])
  np.testing.assert_array_equal(got.first_load, [[2, 0, 0, 1]])
  np.testing.assert_array_equal(got.sent, [[3, 2]])
  np.testing.assert_allclose(got.score, [[1.0, 0.65, 0.5, 0.85]], **EXACT)
  np.testing.assert_allclose(got.prob, got.score, **EXACT)  # softmax scores sum to 1
  np.testing.assert_allclose(got.squared_log_z, [1 + 4 + 1], **EXACT)  # c^2
  assert {a.dtype for a in got[:4]} == {jnp.dtype('int32')}
  got = case_b()
  np.testing.assert_array_equal(got.load, [[2, 1, 2, 1, 2]])
  np.testing.assert_array_equal(got.first_load, [[1, 1, 2, 0, 0]])
  np.testing.assert_array_equal(got.sent, [[2, 3, 2]])
  np.testing.assert_allclose(got.score, [[1.6, 1.7, 1.1, 1.2, 0.9]], **EXACT)
  # Divided by the tokens' sums: (.4 .2 .1 .2 .1) + (.2 .6 .1 .1 0) + (.2 x 5) + (.1 .2 .3 .2 .2)
  np.testing.assert_allclose(got.prob, [[0.9, 1.2, 0.7, 0.7, 0.5]], **EXACT)


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
    got = losses_of(case_a(), make())[name]
    np.testing.assert_allclose(got, [BY_HAND_A[name]], **EXACT)


@pytest.mark.parametrize('name', BY_HAND_B)
def test_loss_of_four_tokens_with_sigmoid_scores_and_an_uneven_last_device_by_hand(name):
  np.testing.assert_allclose(losses_of(case_b(), CFG_B)[name], [BY_HAND_B[name]], **EXACT)


def test_communication_counts_on_the_device_limit():
  # Case A with K = 3 experts per token: M = min(K, D) = 2 as before, and not 3; with one of two
  # groups per token M = 1, which doubles f'' = D / (M T) sent.
  def value(cfg):
    return float(losses_of(case_a(), cfg)['communication'][0])

  assert value(make(4, 3, 2)) == pytest.approx(BY_HAND_A['communication'], rel=1e-6)
  limited = make(num_expert_groups=2, num_limited_groups=1)
  assert value(limited) == pytest.approx(2 * BY_HAND_A['communication'], rel=1e-6)


def test_mutual_information_of_four_tokens_by_hand():
  prob = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], np.float32)
  sums = sums_of(np.zeros((1, 4, 1), np.int32), prob[None], None, np.ones((1, 4), bool), 2)
  # Mean prob (7, 7, 1, 1) / 16: H = 7/8 ln(16/7) + 1/8 ln 16 = ln 16 - 7/8 ln 7.
  # Mean of H: (0 + 0 + ln 2 + ln 4) / 4 = 3/4 ln 2.
  want = -(math.log(16) - 7 / 8 * math.log(7)) + 3 / 4 * math.log(2)
  np.testing.assert_allclose(losses_of(sums, make())['mutual_information'], [want], **EXACT)
  np.testing.assert_array_equal(sums.squared_log_z, [0])  # a router without logits


def test_entropy_by_hand_and_without_a_gradient_at_0():
  prob = jnp.array([0.5, 0.25, 0.25, 0.0])
  # .5 ln 2 + 2 * .25 ln 4 = 1.5 ln 2
  assert float(router_stats.entropy(prob)) == pytest.approx(1.5 * math.log(2), rel=1e-6)
  # d/dp (-p ln p) = -ln p - 1: ln 2 - 1, ln 4 - 1 twice, and 0 where it has no end
  want = [math.log(2) - 1, math.log(4) - 1, math.log(4) - 1, 0]
  np.testing.assert_allclose(jax.grad(router_stats.entropy)(prob), want, **EXACT)


def test_everybody_on_the_same_experts_costs_experts_over_experts_per_token():
  """DeepSeekMoE 2B: 63 routed experts, 7 of them active, 1/7 on each: N' / K' = 9."""
  scores = np.zeros((1, 5, 63), np.float32)
  scores[..., :7] = 1 / 7
  idx = np.tile(np.arange(7, dtype=np.int32), (1, 5, 1))
  cfg = make(63, 7, 9)
  got = losses_of(sums_of(idx, scores, None, np.ones((1, 5), bool), 9), cfg)
  np.testing.assert_allclose(got['expert_level'], [63 / 7], **EXACT)
  # All on the first of 9 devices: f' = 63 / 7 * 5 * 7 / (5 * 7) = 9, P' = 1.
  np.testing.assert_allclose(got['device_level'], [9], **EXACT)


def test_frequency_of_a_huge_batch_does_not_overflow():
  """20M tokens on one of 160 experts: E * load = 3.2e9 is more than an int32 holds."""
  load = np.zeros((1, 160), np.int32)
  load[0, 3] = 20_000_000
  sums = case_a()._replace(
    num_tokens=np.int32([20_000_000]), load=load, score=load.astype(np.float32)
  )
  got = balance_losses.expert_level(sums, make(160, 1, 1))
  np.testing.assert_allclose(got, [160], **EXACT)


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
  return sums_of(*(a[None] for a in arrays), cfg.num_virtual_devices)


@pytest.mark.parametrize('score_func', moe_config.SCORE_FUNCS)
@pytest.mark.parametrize('name', balance_losses.LOSSES)
def test_value_at_perfect_balance(name, score_func):
  cfg = make(8, 2, 8, score_func=score_func)
  want = balance_losses.value_at_balance(name, cfg)
  got = losses_of(balanced_sums(name, cfg), cfg)[name]
  np.testing.assert_allclose(got, [want], rtol=1e-5, atol=1e-6)  # squared deviation: a true 0


def test_declared_values_by_hand():
  def values(cfg):
    return {name: balance_losses.value_at_balance(name, cfg) for name in balance_losses.LOSSES}

  # E = 8: softmax scores sum to 1, sigmoid scores to 4; 4^2: (4 - 1)^2 / 8; ln 8 = 2.0794.
  np.testing.assert_allclose(
    list(values(make(8)).values()),
    [1, 1, 1, 1, 1 / 64, 0, 1, -2.0794415, 4.3240771],
    rtol=1e-6,
  )
  sigmoid = values(make(8, score_func='sigmoid'))
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
  cfg = make(16, k, d, num_expert_groups=groups, num_limited_groups=limit if groups > 1 else 0)
  assert balance_losses.device_limit(cfg) == want


# Two rows of 4 places with 3 and 1 real tokens: case A, and one token on experts 2 and 3 with
# scores (.1, .2, .3, .4).
IDX_2 = np.stack([IDX_A, [[3, 2], [4, 4], [4, 4], [4, 4]]]).astype(np.int32)
P_2 = np.stack([P_A, [[0.1, 0.2, 0.3, 0.4], [0] * 4, [0] * 4, [0] * 4]]).astype(np.float32)
MASK_2 = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


def two_rows():
  return sums_of(IDX_2, P_2, np.log(np.where(P_2 > 0, P_2, 1)), MASK_2, 2)


@pytest.mark.parametrize(
  'scope, want',
  [
    # Each row by itself, times its tokens. Case A: 3 * 10/9. The other: T = 1, f = 4 / 2
    # (0, 0, 1, 1) = 2 twice, 2 * (.3 + .4) = 1.4.
    ('sequence', 3 * 10 / 9 + 1.4),
    # Four tokens: load (2, 2, 1, 3), f = 4 / 8 load = (1, 1, .5, 1.5); scores
    # (1.1, .85, .8, 1.25): sum f P = (1.1 + .85 + .4 + 1.875) / 4, times 4.
    ('micro_batch', 1.1 + 0.85 + 0.4 + 1.875),
    ('global_batch', 1.1 + 0.85 + 0.4 + 1.875),
  ],
)
def test_scopes_by_hand(scope, want):
  def scoped(s):
    return loss_scopes.scoped(balance_losses.expert_level, make(), scope, s, None)

  got = tiny.jit(scoped)(two_rows())
  assert float(got) == pytest.approx(want, rel=1e-6)


def test_global_batch_with_slopes_is_the_linear_part():
  # The real-valued sums are (score, prob, entropy, squared_log_z); slope 2 on score, 3 on entropy.
  s = two_rows()
  slopes = {
    'score': jnp.full(4, 2.0),
    'prob': jnp.zeros(4),
    'entropy': jnp.float32(3.0),
    'squared_log_z': jnp.float32(0.0),
  }
  got = loss_scopes.scoped(balance_losses.expert_level, make(), 'global_batch', s, slopes)
  # The scores of four tokens sum to 4.
  assert float(got) == pytest.approx(2 * 4 + 3 * float(s.entropy.sum()), rel=1e-6)


def test_all_losses_of_a_layer_with_their_own_scopes():
  cfg = make(balance__switch__scope='sequence', balance__gshard__scope='global_batch')
  got = tiny.jit(lambda s: loss_scopes.layer_losses(cfg, s, {}))(two_rows())
  assert set(got) == set(balance_losses.LOSSES)
  alone = losses_of(two_rows(), cfg)
  tokens = np.array([3, 1])
  np.testing.assert_allclose(got['switch'], (alone['switch'] * tokens).sum(), **EXACT)
  whole = losses_of(router_stats.add_up(two_rows()), cfg)
  np.testing.assert_allclose(got['gshard'], whole['gshard'] * 4, **EXACT)
  assert abs(got['switch'] - 4 * whole['switch']) > 0.1  # the scopes tell them apart


# Any batch: 2 layers, 8 ragged rows of 6 places, E = 5, K = 2, D = 3.
B, L, E, LAYERS = 8, 6, 5, 2
REAL = np.arange(L) < np.array([6, 3, 0, 5, 1, 6, 2, 4])[:, None]
ALL_GLOBAL = {f'balance__{name}__scope': 'global_batch' for name in moe_config.LOSSES}
ATTENTION = 'attention_mutual_information'


def rows_of(logits):
  """Sums of each row and of a mixture of attention heads with these logits, [B, L, E]."""
  scores = jnp.where(REAL[..., None], jax.nn.softmax(logits), 0.0)
  idx = jnp.where(REAL[..., None], jax.lax.top_k(scores, 2)[1], E)
  sums = router_stats.sequence_sums(idx, scores, logits, REAL, 3)
  return sums, router_stats.MixtureSums(sums.num_tokens, sums.prob, sums.entropy, sums.num_tokens)


compiled_rows_of = tiny.jit(rows_of)


def totals_of(logits):
  """The same, of all rows; logits [layers, B, L, E]."""
  return jax.vmap(lambda z: jax.tree.map(lambda a: a.sum(0, dtype=a.dtype), rows_of(z)))(logits)


def every_loss(cfg, sums, mixture, slopes):
  """[10] losses of one layer, in the order of `moe_config.LOSSES`."""
  found = loss_scopes.layer_losses(cfg, sums, slopes)
  args = (balance_losses.mutual_information, cfg, cfg.loss(ATTENTION).scope, mixture)
  found[ATTENTION] = loss_scopes.scoped(*args, slopes.get(ATTENTION))
  return jnp.stack([found[name] for name in moe_config.LOSSES])


def stats_of(sums, mixture, losses=None):
  return router_stats.RouterStats(sums, None, None, None, losses or {}, mixture, None)


@functools.cache
def accumulated():
  """Gradients [10, LAYERS, B, L, E]: of the whole batch; of micro-batches of 2 rows, added up with
  slopes; and without."""
  cfg = make(E, 2, 3, **ALL_GLOBAL)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, B, L, E)), jnp.float32)

  def layer_loss(num_micro, logits, slopes):
    def cut(a):
      return a.reshape(num_micro, -1, *a.shape[1:])

    parts = jax.tree.map(cut, rows_of(logits))
    return jax.vmap(lambda parts: every_loss(cfg, *parts, slopes))(parts).sum(0)

  @functools.partial(tiny.jit, static_argnums=0)
  def grad(num_micro, logits, slopes):
    loss = jax.vmap(functools.partial(layer_loss, num_micro))
    return jax.jacrev(lambda z: loss(z, slopes).sum(0))(logits)

  slopes = tiny.jit(lambda z: loss_scopes.global_slopes(cfg, stats_of(*totals_of(z))))(logits)
  return [
    np.asarray(grad(*args)) for args in ((1, logits, {}), (4, logits, slopes), (4, logits, {}))
  ]


@pytest.mark.parametrize('name', moe_config.LOSSES)
def test_slopes_add_up_to_the_gradient_of_the_whole_batch(name):
  """Micro-batches see their own tokens only; the sum of their gradients is the exact one."""
  at = moe_config.LOSSES.index(name)
  whole, linear, naive = (grad[at] for grad in accumulated())
  scale = np.abs(whole).max()
  assert scale > 1e-3
  np.testing.assert_allclose(linear, whole, rtol=1e-4, atol=2e-6 * scale)
  assert not whole[:, ~REAL].any()  # padding
  if name != 'router_z':  # a mean over tokens: the only one that is a sum over parts
    assert np.abs(naive - whole).max() > 0.02 * scale


def test_slopes_are_those_of_the_losses_of_scope_global_batch_only():
  cfg = make(E, 2, 3, balance__switch__scope='global_batch')
  sums, mixture = jax.eval_shape(totals_of, jnp.ones((1, B, L, E)))

  def names(cfg, stats):
    return set(jax.eval_shape(lambda s: loss_scopes.global_slopes(cfg, s), stats))

  assert names(cfg, stats_of(sums, mixture)) == {'switch'}
  cfg = make(E, 2, 3, **ALL_GLOBAL)
  assert names(cfg, stats_of(sums, None)) == set(balance_losses.LOSSES)
  assert names(cfg, stats_of(sums, mixture)) == set(moe_config.LOSSES)


def test_refreshed_puts_the_true_values_in():
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(B, L, E)), jnp.float32)
  total = tiny.jit(totals_of)(logits[None])
  cfg = make(E, 2, 3, **(ALL_GLOBAL | {'balance__switch__scope': 'sequence'}))
  wrong = {name: jnp.array([123.0]) for name in moe_config.LOSSES}
  got = tiny.jit(lambda *args: loss_scopes.refreshed(cfg, stats_of(*args)).losses)(*total, wrong)
  all_global = make(E, 2, 3, **ALL_GLOBAL)
  whole = tiny.jit(lambda rows: every_loss(all_global, *rows, {}))(compiled_rows_of(logits))
  for name, want in zip(moe_config.LOSSES, whole):
    want = 123.0 if name == 'switch' else want  # not of that scope: left alone
    np.testing.assert_allclose(got[name], [want], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  'name, slope',
  [
    # d loss / d s_{t,i} = the frequency of i over T, the same for all tokens (T = 3).
    ('expert_level', np.array([4, 4, 0, 4]) / 3 / 3),
    ('device_level', np.array([4, 4, 2, 2]) / 3 / 3),
    ('communication', np.array([3, 3, 2, 2]) / 3 / 3),
    ('switch', 4 * np.array([2, 0, 0, 1]) / 3 / 3),
    ('gshard', np.array([2, 0, 0, 1]) / 3 / 3 / 4),
  ],
)
def test_counts_carry_no_gradient(name, slope):
  def loss(scores):
    sums = router_stats.sequence_sums(IDX_A[None], scores, None, np.arange(4)[None] < 3, 2)
    return balance_losses.LOSSES[name](sums, make()).sum()

  grad = tiny.jit(jax.grad(loss))(P_A[None].astype(np.float32))
  np.testing.assert_allclose(grad[0, :3], np.tile(slope, (3, 1)), **EXACT)


def test_padding_is_never_counted():
  logits = np.random.default_rng(2).normal(size=(B, L, E)).astype(np.float32)
  filled = np.where(REAL[..., None], logits, 9.0)
  jax.tree.map(np.testing.assert_array_equal, compiled_rows_of(filled), compiled_rows_of(logits))
  # Case A without its padding place is case A.
  row = (IDX_A, P_A.astype(np.float32), LOGITS_A.astype(np.float32), np.ones(4, bool))
  alone = sums_of(*(a[None, :3] for a in row), 2)
  for name, got, want in zip(alone._fields, case_a(), alone):
    np.testing.assert_allclose(got, want, **EXACT, err_msg=name)


def test_an_empty_set_of_tokens_costs_nothing_and_stays_finite():
  sums = jax.tree.map(lambda a: jnp.zeros_like(a), case_a())
  for name, value in losses_of(sums, make()).items():
    np.testing.assert_array_equal(value, [0.0], err_msg=name)
  assert float(router_stats.max_vio(sums.load)[0]) == 0


# Experts of one device among themselves, and devices 0 and 1 (2 experts each) with each other.
WITHIN = np.array([2, 3, 1, 0, 4])


def test_experts_have_no_names():
  """Any order of the experts gives the same losses, and moves their loads along."""
  logits = np.random.default_rng(3).normal(size=(B, L, E)).astype(np.float32)
  before, after = compiled_rows_of(logits)[0], compiled_rows_of(logits[..., WITHIN])[0]
  np.testing.assert_array_equal(after.load, before.load[:, WITHIN])
  np.testing.assert_array_equal(after.first_load, before.first_load[:, WITHIN])
  np.testing.assert_array_equal(after.sent, before.sent[:, [1, 0, 2]])
  cfg = make(E, 2, 3)
  want, got = losses_of(before, cfg), losses_of(after, cfg)
  for name in balance_losses.LOSSES:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('concentration', [0.01, 0.1, 1.0, 10.0])
def test_mutual_information_loss_lies_between_minus_ln_e_and_0(concentration):
  prob = np.random.default_rng(0).dirichlet(np.full(E, concentration), size=(50, 4))
  idx = np.zeros((50, 4, 1), np.int32)
  sums = sums_of(idx, prob.astype(np.float32), None, np.ones((50, 4), bool), 1)
  got = np.asarray(losses_of(sums, make(E, 2, 1))['mutual_information'])
  assert (got >= -math.log(E) - 1e-5).all() and (got <= 1e-5).all()
  assert got.std() > 1e-3  # it says something
  # The same prob for every token, certain or not: token and expert share no information.
  same = np.tile(prob[:, :1], (1, 4, 1)).astype(np.float32)
  got = losses_of(sums_of(idx, same, None, np.ones((50, 4), bool), 1), make(E, 2, 1))
  np.testing.assert_allclose(got['mutual_information'], 0, atol=1e-5)


# Two sequences of 4 tokens. The second has two real tokens; the others carry the index E = 4.
IDX = np.array([[[0, 1], [0, 2], [0, 1], [3, 0]], [[2, 3], [3, 2], [4, 4], [4, 4]]], np.int32)
LOAD = [[4, 2, 1, 1], [0, 0, 2, 2]]


def test_expert_load_counts_every_choice_of_real_tokens():
  load = router_stats.expert_load(jnp.array(IDX), 4)
  np.testing.assert_array_equal(load, LOAD)
  assert load.dtype == jnp.int32
  np.testing.assert_array_equal(router_stats.expert_load(jnp.array(IDX[0]), 4), LOAD[0])


def test_loads_sum_to_real_tokens_times_k():
  rng = np.random.default_rng(0)
  # Different experts per token, and about a third of the tokens is padding.
  idx = np.argsort(rng.random((3, 20, 8)), axis=-1)[..., :3].astype(np.int32)
  real = rng.random((3, 20)) < 2 / 3
  idx[~real] = 8
  load = np.asarray(router_stats.expert_load(jnp.array(idx), 8))
  np.testing.assert_array_equal(load.sum(-1), real.sum(1) * 3)
  np.testing.assert_array_equal(load.sum(0), np.bincount(idx.ravel(), minlength=9)[:8])


def test_by_device_fills_the_last_one_up():
  got = router_stats.by_device(jnp.arange(5.0), 3, -1.0)
  np.testing.assert_array_equal(got, [[0, 1], [2, 3], [4, -1]])


@pytest.mark.parametrize(
  'num_devices, want', [(1, [[25]]), (2, [[13, 12]]), (3, [[10, 9, 6]]), (5, [[7, 3, 3, 6, 6]])]
)
def test_device_load_by_hand(num_devices, want):
  load = np.array([[7, 3, 3, 6, 6]])  # blocks of 5; 3 + 2; 2 + 2 + 1; 1
  np.testing.assert_array_equal(router_stats.device_load(load, num_devices), want)


@pytest.mark.parametrize(
  'counts, want',
  [
    ((7, 3, 1, 5), 0.75),  # mean 4, (7 - 4) / 4
    ((4, 4, 4, 4), 0.0),
    ((0, 16, 0, 0), 3.0),  # E - 1
    ((0, 0, 0, 0), 0.0),  # nothing routed
    ((10**9, 10**9, 10**9, 0), 1 / 3),  # int32 sums would overflow
  ],
)
def test_max_vio_by_hand(counts, want):
  arrays = (np.array(counts), np.array(counts, np.float64), jnp.array(counts, jnp.int32))
  for load in (*arrays, jnp.array(counts, jnp.float32)):
    assert float(router_stats.max_vio(load)) == pytest.approx(want, rel=1e-6)


def test_max_vio_of_numpy_and_jax_agree_per_layer():
  load = np.random.default_rng(0).integers(0, 50, size=(3, 5, 8))
  load[1, 2] = 0
  on_host, on_device = router_stats.max_vio(load), router_stats.max_vio(jnp.array(load))
  assert isinstance(on_host, np.ndarray) and isinstance(on_device, jax.Array)
  assert on_host.shape == (3, 5)
  np.testing.assert_allclose(on_host, on_device, rtol=1e-6)
