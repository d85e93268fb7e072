"""Counts of skipped steps out of the optimizer's own, and what is kept of a skipped step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.training import optim, skipped_steps
from tests import tiny

PARAMS = {'w': jnp.ones(3)}


def optimizer(**overrides):
  cfg = tiny.make(**overrides)
  return optim.optimizer(cfg.optim, cfg.train.num_steps)


@pytest.mark.parametrize(
  'overrides', [{}, {'optim__clip_norm': 0.0}, {'optim__moment_dtype': 'bfloat16'}]
)
def test_what_was_skipped_follows_from_the_counts_of_any_optimizer(overrides):
  chain = optimizer(**overrides)
  state = chain.init(PARAMS)
  seen = []
  for step, applied in enumerate([True, False, True, False, False]):
    placed = skipped_steps.at_step(state, jnp.int32(step))
    in_row = 0 if applied else skipped_steps.count(state, jnp.int32(step)).in_row + 1
    _, state = chain.update(PARAMS, placed, PARAMS, applied=jnp.bool_(applied))
    state = skipped_steps.at_step(state, jnp.int32(step + 1 - in_row))
    seen.append(tuple(int(n) for n in skipped_steps.count(state, jnp.int32(step + 1))))
  assert seen == [(0, 0), (1, 1), (1, 0), (2, 1), (3, 2)]


def test_the_rate_is_that_of_the_step_whatever_was_skipped():
  chain = optimizer(optim__schedule='linear', optim__clip_norm=0.0, optim__weight_decay=0.0)
  cfg = tiny.make(optim__schedule='linear')
  state = skipped_steps.at_step(chain.init(PARAMS), jnp.int32(7))
  updates, _ = chain.update(PARAMS, state, PARAMS)
  rate = optim.learning_rate(cfg.optim, cfg.train.num_steps)(7)
  np.testing.assert_allclose(updates['w'], -rate, rtol=1e-5)  # Adam's first step has size 1


def test_applied_is_what_is_finite_until_too_many_in_a_row_were_skipped():
  def applied(loss, norm, in_row):
    skipped = skipped_steps.Skipped(jnp.int32(9), jnp.int32(in_row))
    return bool(skipped_steps.is_applied(jnp.float32(loss), jnp.float32(norm), skipped, 2))

  assert [applied(1.0, 1.0, n) for n in (0, 2, 3, 4)] == [True, True, False, False]
  for bad in (np.nan, np.inf, -np.inf):
    assert not applied(bad, 1.0, 0) and not applied(1.0, bad, 0)


def test_a_nan_does_not_reach_what_is_kept():
  new = {'w': jnp.array([np.nan, 2.0]), 'n': jnp.int32(3)}
  old = {'w': jnp.array([1.0, -0.0]), 'n': jnp.int32(2)}
  kept = skipped_steps.select(jnp.bool_(False), new, old)
  jax.tree.map(np.testing.assert_array_equal, kept, old)
  assert np.signbit(kept['w'][1])
  assert optax.tree.get(skipped_steps.select(jnp.bool_(True), new, old), 'n') == 3


def test_adam_that_may_leave_its_moments_alone_is_optax_where_it_does_not():
  chain = optimizer(optim__clip_norm=0.0)
  grads = {'w': jnp.array([1e-9, -3.0, 0.7])}
  want_state = got_state = chain.init(PARAMS)
  for _ in range(3):
    want, want_state = chain.update(grads, want_state, PARAMS)
    got, got_state = chain.update(grads, got_state, PARAMS, applied=jnp.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, (got, got_state), (want, want_state))
  bad = {'w': jnp.array([np.nan, np.inf, -np.inf])}
  _, kept = chain.update(bad, got_state, PARAMS, applied=jnp.bool_(False))
  for name in ('mu', 'nu', 'count'):
    before, after = (optax.tree.get_all_with_path(s, name)[0][1] for s in (got_state, kept))
    jax.tree.map(np.testing.assert_array_equal, after, before)
