"""Compiled steps that several files of these tests look at; one of each per process."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.devices import partitioning
from moe_jax.training import loop as loop_lib
from moe_jax.training import optimizer_step, step_timer, train_state
from tests import tiny
from tests.training import steps


@pytest.fixture(scope='session')
def step():
  """The compiled train step with accumulation over 4 micro-batches, on one device."""
  cfg, mesh = tiny.make(**steps.STEP), steps.one_device()
  options = {'xla_backend_optimization_level': 0}
  train_step, state = optimizer_step.make_train_step(cfg, mesh), steps.fresh(cfg)
  with partitioning.activate(mesh):
    lowered = train_step.lower(state, tiny.batch())
  return lowered.compile(compiler_options=options)


@pytest.fixture(scope='session')
def whole():
  """(loss, gradients) of the whole ragged batch at once."""
  return tiny.gradients()(tiny.params(tiny.make().model), tiny.batch())


@pytest.fixture(scope='session')
def first(step):
  """(state, metrics) after one step on the ragged batch."""
  return step(steps.fresh(tiny.make(**steps.STEP)), tiny.batch())


@pytest.fixture(scope='session')
def dense_run():
  """(config, mesh, state at seed 0, the reports of three steps)."""
  cfg, mesh = tiny.make(**steps.DENSE), steps.one_device()
  state = train_state.init_state(cfg, mesh)
  start = jax.tree.map(jnp.copy, state)
  rows = [tiny.batch(((16,), (9,))), tiny.batch(((5, 5), (16,))), tiny.batch(((1,), (16,)))]
  timer = step_timer.StepTimer(flops_per_token=1.0, peak=1.0)
  reports = []
  train_step = optimizer_step.make_train_step(cfg, mesh)
  for report in loop_lib.steps(
    train_step, state, iter(rows), mesh=mesh, put=steps.put(mesh), timer=timer
  ):
    reports.append((report.step, optimizer_step.host_metrics(report.metrics)))
    state = report.state
  return cfg, mesh, start, state, reports
