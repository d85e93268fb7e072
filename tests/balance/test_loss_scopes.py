import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import balance_losses, loss_scopes, router_stats
from moe_jax.config import moe_config
from tests import tiny
from tests.balance import routed

# Two rows of 4 places with 3 and 1 real tokens: case A, and one token on experts 2 and 3 with
# scores (.1, .2, .3, .4).
IDX_2 = np.stack([routed.IDX_A, [[3, 2], [4, 4], [4, 4], [4, 4]]]).astype(np.int32)
P_2 = np.stack([routed.P_A, [[0.1, 0.2, 0.3, 0.4], [0] * 4, [0] * 4, [0] * 4]]).astype(np.float32)
MASK_2 = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


def two_rows():
  return routed.sums_of(IDX_2, P_2, np.log(np.where(P_2 > 0, P_2, 1)), MASK_2, 2)


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
    return loss_scopes.scoped(balance_losses.expert_level, routed.make(), scope, s, None)

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
  got = loss_scopes.scoped(balance_losses.expert_level, routed.make(), 'global_batch', s, slopes)
  # The scores of four tokens sum to 4.
  assert float(got) == pytest.approx(2 * 4 + 3 * float(s.entropy.sum()), rel=1e-6)


def test_all_losses_of_a_layer_with_their_own_scopes():
  cfg = routed.make(balance__switch__scope='sequence', balance__gshard__scope='global_batch')
  got = tiny.jit(lambda s: loss_scopes.layer_losses(cfg, s, {}))(two_rows())
  assert set(got) == set(balance_losses.LOSSES)
  alone = routed.losses_of(two_rows(), cfg)
  tokens = np.array([3, 1])
  np.testing.assert_allclose(got['switch'], (alone['switch'] * tokens).sum(), **routed.EXACT)
  whole = routed.losses_of(router_stats.add_up(two_rows()), cfg)
  np.testing.assert_allclose(got['gshard'], whole['gshard'] * 4, **routed.EXACT)
  assert abs(got['switch'] - 4 * whole['switch']) > 0.1  # the scopes tell them apart


ALL_GLOBAL = {f'balance__{name}__scope': 'global_batch' for name in moe_config.LOSSES}
ATTENTION = 'attention_mutual_information'


def totals_of(logits):
  """The same, of all rows; logits [layers, B, L, E]."""
  return jax.vmap(lambda z: jax.tree.map(lambda a: a.sum(0, dtype=a.dtype), routed.rows_of(z)))(
    logits
  )


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
  cfg = routed.make(routed.E, 2, 3, **ALL_GLOBAL)
  logits = jnp.asarray(
    np.random.default_rng(0).normal(size=(routed.LAYERS, routed.B, routed.L, routed.E)), jnp.float32
  )

  def layer_loss(num_micro, logits, slopes):
    def cut(a):
      return a.reshape(num_micro, -1, *a.shape[1:])

    parts = jax.tree.map(cut, routed.rows_of(logits))
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
  assert not whole[:, ~routed.REAL].any()  # padding
  if name != 'router_z':  # a mean over tokens: the only one that is a sum over parts
    assert np.abs(naive - whole).max() > 0.02 * scale


def test_slopes_are_those_of_the_losses_of_scope_global_batch_only():
  cfg = routed.make(routed.E, 2, 3, balance__switch__scope='global_batch')
  sums, mixture = jax.eval_shape(totals_of, jnp.ones((1, routed.B, routed.L, routed.E)))

  def names(cfg, stats):
    return set(jax.eval_shape(lambda s: loss_scopes.global_slopes(cfg, s), stats))

  assert names(cfg, stats_of(sums, mixture)) == {'switch'}
  cfg = routed.make(routed.E, 2, 3, **ALL_GLOBAL)
  assert names(cfg, stats_of(sums, None)) == set(balance_losses.LOSSES)
  assert names(cfg, stats_of(sums, mixture)) == set(moe_config.LOSSES)


def test_refreshed_puts_the_true_values_in():
  logits = jnp.asarray(
    np.random.default_rng(1).normal(size=(routed.B, routed.L, routed.E)), jnp.float32
  )
  total = tiny.jit(totals_of)(logits[None])
  cfg = routed.make(routed.E, 2, 3, **(ALL_GLOBAL | {'balance__switch__scope': 'sequence'}))
  wrong = {name: jnp.array([123.0]) for name in moe_config.LOSSES}
  got = tiny.jit(lambda *args: loss_scopes.refreshed(cfg, stats_of(*args)).losses)(*total, wrong)
  all_global = routed.make(routed.E, 2, 3, **ALL_GLOBAL)
  whole = tiny.jit(lambda rows: every_loss(all_global, *rows, {}))(routed.compiled_rows_of(logits))
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
    sums = router_stats.sequence_sums(routed.IDX_A[None], scores, None, np.arange(4)[None] < 3, 2)
    return balance_losses.LOSSES[name](sums, routed.make()).sum()

  grad = tiny.jit(jax.grad(loss))(routed.P_A[None].astype(np.float32))
  np.testing.assert_allclose(grad[0, :3], np.tile(slope, (3, 1)), **routed.EXACT)
