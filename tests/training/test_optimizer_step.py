import numpy as np
import optax

from moe_jax.training import optim
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
