import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.devices import partitioning
from moe_jax.training import optim, optimizer_step, train_state
from tests import tiny

# eps is large so that Adam does not blow the last bit of a tiny gradient up to a whole step.
STEP = {'train__micro_batch_size': 2, 'optim__eps': 1e-3, 'optim__clip_norm': 0.0}


def one_device():
  return partitioning.make_mesh(tiny.make(mesh__data=1).mesh, jax.devices()[:1])


def fresh(cfg):
  params = jax.tree.map(jnp.copy, tiny.params(cfg.model))  # the step donates its state
  opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(params)
  return train_state.TrainState(jnp.int32(0), jnp.uint32(0), params, {}, opt_state)


@pytest.fixture(scope='module')
def step():
  """The compiled train step with accumulation over 4 micro-batches, on one device."""
  cfg, mesh = tiny.make(**STEP), one_device()
  options = {'xla_backend_optimization_level': 0}
  train_step, state = optimizer_step.make_train_step(cfg, mesh), fresh(cfg)
  with partitioning.activate(mesh):
    lowered = train_step.lower(state, tiny.batch())
  return lowered.compile(compiler_options=options)


@pytest.fixture(scope='module')
def whole():
  """(loss, gradients) of the whole ragged batch at once."""
  return tiny.gradients()(tiny.params(tiny.make().model), tiny.batch())


@pytest.fixture(scope='module')
def first(step):
  """(state, metrics) after one step on the ragged batch."""
  return step(fresh(tiny.make(**STEP)), tiny.batch())


def test_one_step_is_the_optimizer_on_the_gradients_of_the_whole_batch(first, whole):
  cfg = tiny.make(**STEP)
  before, (state, got) = fresh(cfg), first
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
  state, rows = fresh(tiny.make(**STEP)), tiny.batch()
  losses = []
  for _ in range(40):
    state, got = step(state, rows)
    losses.append(float(got.loss))
  # ln 32 = 3.5 is knowing nothing; these weights start above it and learn 90 tokens by heart.
  assert losses[0] > 3.5
  assert losses[-1] < 1.5
