import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training import loop as loop_lib
from moe_jax.training import optimizer_step, skipped_steps, step_timer
from tests import tiny
from tests.training import steps


def test_loop_does_one_step_per_batch(dense_run):
  *_, state, reports = dense_run
  assert [step for step, _ in reports] == [1, 2, 3]
  assert int(state.step) == 3
  for _, values in reports:
    assert values['max_vio'] is None  # dense
    assert values['lr'] == pytest.approx(1e-2)
    assert np.isfinite(values['loss']) and values['grad_norm'] > 0


class OnDevice:
  """A number that is still being computed: it can be waited for, and reading it is an error."""

  def __init__(self, step, waits):
    self._step, self._waits = step, waits

  def block_until_ready(self):
    self._waits.append(self._step)
    return self


def test_steps_are_not_waited_for_but_a_few_steps_behind():
  launched, waits = [], []

  class Step:  # in place of the jitted one; what it returns has no value that the host could read
    def lower(self, state, batch):
      return self

    def compile(self):
      return self

    def __call__(self, state, batch):
      launched.append(len(launched) + 1)
      assert waits == launched[: -1 - loop_lib.MAX_IN_FLIGHT]
      loss = OnDevice(launched[-1], waits)
      return object(), optimizer_step.StepMetrics(loss, *[object()] * 6)

  timer = step_timer.StepTimer(flops_per_token=1.0, peak=1.0)
  rows, state = tiny.batch(((16,), (9,))), types.SimpleNamespace(step=0)
  mesh = steps.one_device()
  loop = loop_lib.steps(
    Step(), state, iter([rows] * 6), mesh=mesh, put=steps.put(mesh), timer=timer
  )
  assert [report.step for report in loop] == [1, 2, 3, 4, 5, 6]
  assert waits == [1, 2, 3, 4]


def test_host_metrics_average_over_layers():
  load = jnp.array([[7, 3, 1, 5], [4, 4, 4, 4]])
  sums = types.SimpleNamespace(load=load)
  dropped = jnp.array([[4, 0, 0, 0], [0, 0, 0, 0]])
  stats = types.SimpleNamespace(sums=sums, dropped=dropped, overflow=jnp.array([2, 0]))
  values = optimizer_step.host_metrics(
    optimizer_step.StepMetrics(
      loss=jnp.float32(2),
      mtp_loss=jnp.float32(7),
      aux_loss=jnp.float32(5),
      lr=jnp.float32(3),
      grad_norm=4.0,
      stats=stats,
      skipped=skipped_steps.Skipped(jnp.int32(6), jnp.int32(1)),
    )
  )
  # 16 assignments per layer, 4 of them dropped in the first.
  assert values == {
    'loss': 2,
    'mtp_loss': 7,
    'lr': 3,
    'grad_norm': 4,
    'aux_loss': 5,
    'max_vio': (0.75 + 0) / 2,
    'overflow_rate': 2 / 32,
    'drop_rate': (0.25 + 0) / 2,
    'skipped_steps': 6,
  }


class Recorder:
  """A callback that notes what it was given."""

  def __init__(self, log, name, on_step=lambda report: None):
    self._log, self._name, self._on_step = log, name, on_step

  def after_step(self, report):
    self._log.append((self._name, report.step, report.complete, report.stopped_by))
    self._on_step(report)


def reports(num_steps):
  return (loop_lib.StepReport(step, f'state {step}', None) for step in range(1, num_steps + 1))


def test_callbacks_are_called_in_order_up_to_the_last_step():
  log = []
  last = loop_lib.run(reports(5), [Recorder(log, 'a'), Recorder(log, 'b')], num_steps=2)
  assert log == [
    ('a', 1, False, ''), ('b', 1, False, ''), ('a', 2, True, ''), ('b', 2, True, '')
  ]  # fmt: skip
  assert last.state == 'state 2' and last.last


def test_a_stop_is_asked_for_once_per_step_and_told_to_all_callbacks_from_the_next_on():
  log, asked, signals = [], [], ['']

  def stop_requested():
    asked.append(signals[0])
    return signals[0]

  def raise_signal(report):
    if report.step == 2:  # as if it came while the first callback runs
      signals[0] = 'SIGTERM'

  callbacks = [Recorder(log, 'a', raise_signal), Recorder(log, 'b')]
  last = loop_lib.run(reports(9), callbacks, num_steps=9, stop_requested=stop_requested)
  assert [entry[1:] for entry in log if entry[0] == 'b'] == [
    (1, False, ''), (2, False, ''), (3, False, 'SIGTERM')
  ]  # fmt: skip
  assert asked == ['', '', 'SIGTERM']
  assert last.step == 3 and last.last and not last.complete


def test_no_step_is_no_report():
  assert loop_lib.run(iter(()), [Recorder([], 'a')], num_steps=3) is None


class Regression(NamedTuple):
  """State of a stage that trains no language model."""

  step: jax.Array
  weight: jax.Array


class SquaredError(NamedTuple):
  loss: jax.Array


def test_another_objective_with_batches_made_on_the_way_uses_the_same_loop():
  """As in reinforcement learning: what the next batch is depends on the state so far."""

  @jax.jit
  def step(state, batch):
    def error(w):
      return jnp.square(batch['x'] * w - batch['y']).mean()

    loss, grad = jax.value_and_grad(error)(state.weight)
    return Regression(state.step + 1, state.weight - 0.1 * grad), SquaredError(loss)

  seen, timer = [1.0], step_timer.StepTimer(flops_per_token=1.0, peak=1.0)

  class Rollouts:
    def after_step(self, report):
      seen.append(float(report.state.weight))

  def batches():
    while True:
      x = np.full(len(seen), seen[-1], np.float32)  # another shape in each step
      yield {'x': x, 'y': 3 * x}

  last = loop_lib.run(
    loop_lib.steps(
      step,
      Regression(jnp.int32(0), jnp.float32(1)),
      batches(),
      mesh=steps.one_device(),
      put=lambda batch: {key: jnp.asarray(value) for key, value in batch.items()},
      timer=timer,
      num_tokens=lambda batch: batch['x'].size,
    ),
    [Rollouts()],
    num_steps=3,
  )
  # w <- w + 0.2 x^2 (3 - w) with x = w: 1, 1.4, 1.4 + 0.2 * 1.96 * 1.6 = 2.0272, ...
  np.testing.assert_allclose(seen[:3], [1, 1.4, 2.0272], rtol=1e-5)
  assert last.step == 3 and last.complete and timer._tokens == 1 + 2 + 3
