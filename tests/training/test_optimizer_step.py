import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import integer_hash
from moe_jax.training import objective, optim, optimizer_step, train_state
from tests import tiny
from tests.training import steps


def test_one_step_is_the_optimizer_on_the_gradients_of_the_whole_batch(first, whole):
  cfg = tiny.make(**steps.STEP)
  before, (state, got) = steps.fresh(cfg), first
  optimizer = optim.optimizer(cfg.optim, cfg.train.num_steps)

  @tiny.jit
  def update(grads, state):
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), optax.tree.norm(grads)

  want, norm = update(whole[1], before)
  tiny.assert_trees_close(state.params, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got.grad_norm, norm, rtol=1e-4)
  assert state.step == 1
  assert got.lr == np.float32(1e-2)


def test_a_fixed_batch_is_learnt(step):
  state, rows = steps.fresh(tiny.make(**steps.STEP)), tiny.batch()
  losses = []
  for _ in range(40):
    state, got = step(state, rows)
    losses.append(float(got.loss))
  # ln 32 = 3.5 is knowing nothing; these weights start above it and learn 90 tokens by heart.
  assert losses[0] > 3.5
  assert losses[-1] < 1.5


def poisoned(cfg, expert=5):
  """A state with one NaN in one expert's matrix."""
  state = steps.fresh(cfg)
  moe = state.params['moe_layers']['moe']
  moe['gate_up'] = moe['gate_up'].at[1, expert, 0, 0, 0].set(jnp.nan)
  return state


def host(tree):
  return jax.device_get(jax.tree.map(jnp.copy, tree))


def test_a_step_that_is_not_finite_changes_nothing_but_the_step(step):
  cfg = tiny.make(**steps.STEP)
  before = host(poisoned(cfg))
  state, got = step(poisoned(cfg), tiny.batch())
  assert not np.isfinite(got.loss) and (got.skipped.total, got.skipped.in_row) == (1, 1)
  jax.tree.map(np.testing.assert_array_equal, host(state), before.replace(step=np.int32(1)))

  # Mended, it goes on: the count of all stays, that in a row starts anew.
  state, got = step(state.replace(params=steps.fresh(cfg).params), tiny.batch())
  assert np.isfinite(got.loss) and (got.skipped.total, got.skipped.in_row) == (1, 0)
  assert np.abs(state.params['head'] - before.params['head']).max() > 0


def test_a_token_id_outside_of_the_vocabulary_poisons_no_state(step):
  cfg, rows = tiny.make(**steps.STEP), tiny.batch()
  rows['tokens'] = rows['tokens'].copy()
  rows['tokens'][3, 2] = 10**6
  before = host(steps.fresh(cfg))
  state, got = step(steps.fresh(cfg), rows)
  assert got.skipped.total == 1
  jax.tree.map(np.testing.assert_array_equal, host(state), before.replace(step=np.int32(1)))


def test_after_too_many_in_a_row_finite_steps_are_not_applied_either(step):
  """The host reads metrics a few steps late, and dumps the state that it then finds."""
  cfg = tiny.make(**steps.STEP)
  most = cfg.train.max_skipped_steps
  state = poisoned(cfg)
  for i in range(most + 1):
    state, got = step(state, tiny.batch())
    assert got.skipped.in_row == i + 1
  before = host(state.replace(params=steps.fresh(cfg).params))
  state, got = step(state.replace(params=steps.fresh(cfg).params), tiny.batch())
  assert np.isfinite(got.loss) and got.skipped.in_row == most + 2
  jax.tree.map(np.testing.assert_array_equal, host(state.params), before.params)


def test_rate_lambda_and_seed_are_those_of_the_steps_own_number(monkeypatch):
  """Without a model: Adam's update of a gradient that is always 1 is the rate."""
  cfg = tiny.make(
    optim__peak_lr=2.0,
    optim__schedule='constant',
    optim__warmup_steps=4,
    optim__weight_decay=0.0,
    optim__eps=1e-9,
    train__mtp_loss_ramp=((0.05, 0.3), (0.1, 0.2)),  # of 20 steps: until 1, until 2
    train__mtp_loss_weight=0.1,
  )
  params, given = {'w': jnp.zeros(3)}, []

  def gradients(cfg, params, router_state, batch, seed, mtp_weight):
    given.append((int(seed), float(mtp_weight)))
    one = jnp.float32(1)
    return objective.Loss(one, None, one, None), {'w': jnp.ones(3)}

  monkeypatch.setattr(objective, 'gradients', gradients)
  opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(params)
  state = train_state.TrainState(jnp.int32(0), jnp.uint32(7), params, {}, opt_state)
  step = optimizer_step.step_function(cfg)
  for number, rate in enumerate((0.5, 1.0, 1.5, 2.0)):
    before = state.params['w']
    state, got = step(state, {})
    np.testing.assert_allclose(got.lr, rate, rtol=1e-6)
    np.testing.assert_allclose(before - state.params['w'], rate, rtol=1e-5)
    assert state.step == number + 1 and state.seed == 7
  seeds, weights = zip(*given)
  want = [int(integer_hash.combine(jnp.uint32(7), jnp.int32(n))) for n in range(4)]
  assert list(seeds) == want and len(set(want)) == 4
  np.testing.assert_allclose(weights, [0.3, 0.2, 0.1, 0.1], rtol=1e-6)
