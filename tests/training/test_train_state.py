import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.training import loop as loop_lib
from moe_jax.training import objective, optim, optimizer_step, step_timer, train_state
from tests import tiny

# eps is large so that Adam does not blow the last bit of a tiny gradient up to a whole step.
STEP = {'train__micro_batch_size': 2, 'optim__eps': 1e-3, 'optim__clip_norm': 0.0}
# The smallest dense model: where the loop matters and the model does not.
DENSE = {'model__moe__num_experts': 0, 'model__num_layers': 1, 'train__batch_size': 2}


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


def put(mesh):
  return lambda batch: partitioning.put_batch(objective.inputs(batch), mesh)


@pytest.fixture(scope='module')
def dense_run():
  """(config, mesh, state at seed 0, the reports of three steps)."""
  cfg, mesh = tiny.make(**DENSE), one_device()
  state = train_state.init_state(cfg, mesh)
  start = jax.tree.map(jnp.copy, state)
  rows = [tiny.batch(((16,), (9,))), tiny.batch(((5, 5), (16,))), tiny.batch(((1,), (16,)))]
  timer = step_timer.StepTimer(flops_per_token=1.0, peak=1.0)
  reports = []
  train_step = optimizer_step.make_train_step(cfg, mesh)
  for report in loop_lib.steps(
    train_step, state, iter(rows), mesh=mesh, put=put(mesh), timer=timer
  ):
    reports.append((report.step, optimizer_step.host_metrics(report.metrics)))
    state = report.state
  return cfg, mesh, start, state, reports


def test_seed_decides_the_start(dense_run):
  cfg, mesh, start, *_ = dense_run

  def init(seed):
    return train_state.init_state(tiny.make(**DENSE, train__seed=seed), mesh)

  jax.tree.map(np.testing.assert_array_equal, init(cfg.train.seed), start)
  assert not np.array_equal(init(1).params['embedding'], start.params['embedding'])


def test_start_has_the_asked_deviation_and_layers_of_their_own(dense_run):
  cfg, _, start, *_ = dense_run
  for path, leaf in jax.tree_util.tree_leaves_with_path(start.params):
    if path[-1].key == 'scale':
      assert (leaf == 1).all()
    else:
      # At least 256 draws each: within 20 %.
      assert np.std(leaf) == pytest.approx(cfg.model.init_std, rel=0.2), path
  assert start.step == 0


def test_abstract_state_is_the_real_one(dense_run):
  cfg, mesh, start, *_ = dense_run

  def describe(x):
    return (x.shape, x.dtype, x.sharding)

  jax.tree.map(
    lambda a, b: np.testing.assert_equal(describe(a), describe(b)),
    train_state.abstract_state(cfg, mesh),
    start,
  )


def test_state_is_described_under_an_active_mesh_too():
  cfg, mesh = tiny.make(**DENSE), one_device()
  with partitioning.activate(mesh):
    got = train_state.abstract_state(cfg, mesh)
  assert got == train_state.abstract_state(cfg, mesh)


def test_stacked_layers_start_different():
  params = jax.eval_shape(
    functools.partial(train_state._init, tiny.make()), jax.random.key(0)
  ).params
  assert params['moe_layers']['moe']['down'].value.shape[0] == 2
  cfg = tiny.make(model__moe__num_experts=0, model__num_layers=2).model
  kernel = jax.tree.leaves(
    jax.jit(
      lambda key: model_variables.init(cfg, key)['params']['dense_layers']['mlp']['down'].value
    )(jax.random.key(0))
  )[0]
  assert not np.array_equal(kernel[0], kernel[1])


def reports(num_steps):
  return (loop_lib.StepReport(step, f'state {step}', None) for step in range(1, num_steps + 1))
