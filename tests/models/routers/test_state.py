"""What routing remembers, moved by hand; the tables that a run puts in before its first step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import router_stats
from moe_jax.config import moe_config
from moe_jax.models.routers import ROUTERS, routing, state
from tests import tiny

U = np.float32(1e-3)  # the default update rate


@functools.cache
def make(e=4, k=1, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig`."""
  values = {'num_experts': e, 'num_experts_per_tok': k} | overrides
  return tiny.make(**{f'model__moe__{key}': v for key, v in values.items()}).model.moe


def stats_of(load, dropped=None) -> router_stats.RouterStats:
  """The books of [layers, E] loads, as far as the update reads them."""
  load = np.asarray(load, np.int32)
  dropped = np.zeros_like(load) if dropped is None else np.asarray(dropped, np.int32)
  sums = router_stats.Sums(None, load, *[None] * 6)
  return router_stats.RouterStats(sums, dropped, None, None, {}, None, None)


@functools.partial(tiny.jit, static_argnums=0)
def _update(cfg, old, stats, share):
  return state.update(cfg, old, stats, share)


def update(cfg, old, load, share=0.0, dropped=None):
  new = _update(cfg, old, stats_of(load, dropped), np.float32(share))
  return {name: np.asarray(value) for name, value in new.items()}


def bias_after(cfg, load, start=0.0, share=0.0):
  old = {'expert_bias': np.broadcast_to(np.float32(start), np.shape(load))}
  return update(cfg, old, load, share)['expert_bias']


SIGN = make(expert_bias__update_rule='sign')
PROPORTIONAL = make(expert_bias__update_rule='proportional')
SIGN8 = make(8, 2, expert_bias__update_rule='sign')
PROPORTIONAL8 = make(8, 2, expert_bias__update_rule='proportional')


def test_a_step_of_the_paper():
  # Counts (7, 3, 1, 5): mean 4, errors (-3, 1, 3, -1).
  np.testing.assert_array_equal(bias_after(SIGN, [[7, 3, 1, 5]]), [[-U, U, U, -U]])


def test_layers_move_by_themselves_and_a_balanced_one_stays():
  # Layer 1 is balanced; in layer 2 experts 2 and 3 have the mean load: sign(0) = 0.
  got = bias_after(SIGN, [[7, 3, 1, 5], [4, 4, 4, 4], [9, 7, 8, 8]], start=0.5)
  want = np.float32(0.5) + U * np.array([[-1, 1, 1, -1], [0, 0, 0, 0], [-1, 1, 0, 0]], np.float32)
  np.testing.assert_array_equal(got, want)


def test_a_mean_that_is_no_integer():
  # Mean 10 / 4 = 2.5, which integer division would round to 2.
  np.testing.assert_array_equal(bias_after(SIGN, [[2, 3, 2, 3]]), [[U, -U, U, -U]])


def test_the_proportional_rule_divides_by_the_mean():
  # (4 - c) / 4 = (-.75, .25, .75, -.25); ten times the tokens move it as far.
  want = [U * np.array([-0.75, 0.25, 0.75, -0.25], np.float32)]
  np.testing.assert_allclose(bias_after(PROPORTIONAL, [[7, 3, 1, 5]]), want, rtol=1e-6)
  np.testing.assert_allclose(bias_after(PROPORTIONAL, [[70, 30, 10, 50]]), want, rtol=1e-6)
  np.testing.assert_array_equal(bias_after(PROPORTIONAL, [[0, 0, 0, 0]]), np.zeros((1, 4)))


def test_the_rate_is_that_of_the_config_and_0_from_update_until_on():
  cfg = make(
    expert_bias__update_rule='sign',
    expert_bias__update_rate=0.25,
    expert_bias__update_until=0.5,
  )
  for share, rate in ((0.0, 0.25), (0.49, 0.25), (0.5, 0.0), (0.9, 0.0)):
    np.testing.assert_array_equal(
      bias_after(cfg, [[7, 3, 1, 5]], share=share), [rate * np.array([-1, 1, 1, -1])]
    )
  # To the last step by default: the share of step n - 1 of n is below 1.
  np.testing.assert_array_equal(bias_after(SIGN, [[7, 3, 1, 5]], share=0.999)[0, 0], -U)


def test_n_steps_move_it_by_at_most_n_rates():
  rng, start = np.random.default_rng(0), np.zeros((3, 8), np.float32)
  sign, proportional = start, start
  for n in range(1, 21):
    load = rng.integers(1, 20, size=(3, 8)) + 10 * (np.arange(8) < 2)
    sign = bias_after(SIGN8, load, sign)
    assert np.abs(sign).max() <= n * U * 1.00001  # float32 sums
    before = proportional
    proportional = bias_after(PROPORTIONAL8, load, proportional)
    # (mean - load) / mean lies between -MaxVio and 1.
    most = np.maximum(router_stats.max_vio(load.astype(float)), 1)[:, None]
    assert (np.abs(proportional - before) <= most * U * 1.001).all()
  # Experts 0 and 1 were the crowded ones, in most steps.
  assert (sign[:, :2] <= -10 * U).all() and (proportional[:, :2] < -5 * U).all()


def start(cfg, router='topk'):
  return state.init(cfg, ROUTERS[router], routing.Sizes(32, 16), jax.random.key(0))


def test_where_states_start():
  assert start(make()) == {}
  got = start(make(expert_bias__update_rule='sign'))
  np.testing.assert_array_equal(got['expert_bias'], np.zeros(4))
  multiplicative = {
    'expert_bias__update_rule': 'proportional',
    'expert_bias__form': 'multiplicative',
  }
  got = start(make(**multiplicative))
  np.testing.assert_array_equal(got['expert_bias'], np.ones(4))
  assert got['expert_bias'].dtype == jnp.float32
  got = start(make(balance__adaptive__loss='squared_deviation'))
  assert float(got['loss_coefficient']) == np.float32(0.01)
  assert set(start(make(router='hash'), 'hash')) == {'table'}


def test_an_update_leaves_tables_alone():
  table = np.arange(12, dtype=np.int32).reshape(1, 6, 2) % 4
  old = {'table': table, 'loss_coefficient': np.float32([0.01])}
  cfg = make(router='hash', balance__adaptive__loss='squared_deviation')
  new = update(cfg, old, [[4, 4, 4, 4]])
  np.testing.assert_array_equal(new['table'], table)
  assert new['loss_coefficient'] < 0.01


# Skywork-MoE: xi = 1/5, alpha_max = 0.01, beta = 0.99 are the defaults.
ADAPTIVE = {'balance__adaptive__loss': 'squared_deviation'}
CAPACITY = ADAPTIVE | {'capacity__policy': 'score', 'capacity__factor': 1.0}


def coefficient(cfg, old, load, dropped=None):
  old = {'loss_coefficient': np.asarray(old, np.float32)}
  return update(cfg, old, load, dropped=dropped)['loss_coefficient']


def test_a_step_of_the_coefficient_by_hand():
  # 100 assignments, 2 dropped: d = .02, target .2 * .02 = .004 in layer 0; nothing in layer 1;
  # d = .2 in layer 2: the target is alpha_max.
  load = [[40, 20, 20, 20]] * 3
  dropped = [[2, 0, 0, 0], [0, 0, 0, 0], [20, 0, 0, 0]]
  got = coefficient(make(**CAPACITY), [0.006] * 3, load, dropped)
  want = 0.99 * 0.006 + 0.01 * np.array([0.004, 0.0, 0.01])
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('dropped, limit', [(2, 0.004), (20, 0.01), (0, 0.0)])
def test_a_constant_drop_rate_settles_at_min_of_slope_times_rate_and_maximum(dropped, limit):
  alpha, seen = [0.01], []
  for _ in range(1000):
    alpha = coefficient(make(**CAPACITY), alpha, [[40, 20, 20, 20]], [[dropped, 0, 0, 0]])
    seen.append(float(alpha[0]))
  assert min(seen) >= 0 and max(seen) <= 0.01 * 1.00001
  # .99^1000 = 4e-5 of the start is left.
  assert seen[-1] == pytest.approx(limit, abs=1e-6)


def test_without_capacity_the_drop_rate_is_what_a_capacity_would_have_dropped():
  # Load (50, 30, 15, 5), mean 25. Factor 1: 25 + 5 of 100 are above; factor 1.5: 12.5.
  def rate(factor, load):
    return float(
      state.drop_rate(
        make(**ADAPTIVE, balance__adaptive__capacity_factor=factor), stats_of([load])
      )[0]
    )

  assert rate(1.0, [50, 30, 15, 5]) == pytest.approx(0.3)
  assert rate(1.5, [50, 30, 15, 5]) == pytest.approx(0.125)
  assert rate(2.0, [50, 30, 15, 5]) == 0
  assert rate(1.0, [0, 0, 0, 0]) == 0  # no tokens
  # Each layer has a mean of its own: 25 and 10.
  layers = stats_of([[50, 30, 15, 5], [40, 0, 0, 0], [10, 10, 10, 10]])
  one = make(**ADAPTIVE, balance__adaptive__capacity_factor=1.0)
  np.testing.assert_allclose(state.drop_rate(one, layers), [0.3, 0.75, 0.0], rtol=1e-6)
  # With a capacity the real drops count, whatever that factor says.
  real = stats_of([[50, 30, 15, 5]], [[4, 0, 0, 0]])
  assert float(state.drop_rate(make(**CAPACITY), real)[0]) == pytest.approx(0.04)
