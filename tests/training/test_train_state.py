import functools

import jax
import numpy as np
import pytest

from moe_jax.devices import compile_options, partitioning
from moe_jax.models import model_variables
from moe_jax.training import loop as loop_lib
from moe_jax.training import train_state
from tests import tiny
from tests.training import steps


def test_seed_decides_the_start(dense_run):
  cfg, mesh, start, *_ = dense_run

  def init(seed):
    return train_state.init_state(tiny.make(**steps.DENSE, train__seed=seed), mesh)

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
  cfg, mesh = tiny.make(**steps.DENSE), steps.one_device()
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


@pytest.mark.slow  # it compiles as runs do
def test_a_state_that_is_compiled_in_haste_has_the_usual_bits(monkeypatch):
  cfg = tiny.make(**steps.DENSE | {'train__seed': 3, 'model__num_layers': 1})
  mesh = partitioning.make_mesh(cfg.mesh)

  def bits(level):
    monkeypatch.setattr(compile_options, 'FIRST_STATE_LEVEL', level)
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(train_state.init_state(cfg, mesh))]

  assert bits(1) == bits(3)  # the usual one of XLA; tests have 0
