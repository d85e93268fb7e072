"""The training loop of every stage: one optimizer step per batch, and callbacks after each.

It knows no objective: a stage brings its step function, its state (whose `step` counts the steps
done), its batches and its callbacks. A run resumes by these rules:
  1. The newest whole checkpoint decides the step; metrics past it are dropped, and the steps are
  redone. 2. The batch at step n is a pure function of (seed, n), so n is all the data pipeline
  needs. 3. State and batch being equal, the redone steps are bit-identical on the same hardware.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from moe_jax import trees
from moe_jax.devices import partitioning
from moe_jax.training import step_timer

Array = jax.Array

# Steps the host may run ahead of the device: enough to keep it busy, few enough that waiting for
# data is seen as waiting.
MAX_IN_FLIGHT = 2


class StepReport(NamedTuple):
  """What callbacks are given after a step. The state is donated to the next one."""

  step: int  # optimizer steps done, this one included
  state: trees.Tree
  metrics: Any  # with a scalar `loss`
  complete: bool = False  # whether this was the last of the run's steps
  stopped_by: str = ''  # the signal after which no step follows; '' = none came

  @property
  def last(self) -> bool:
    """Whether no step follows, the run being complete or stopped."""
    return self.complete or bool(self.stopped_by)


class Callback(Protocol):
  """Something that is done after steps: logging, evaluating, saving."""

  def after_step(self, report: StepReport):
    """Called after every step, which may still be running on the device.

    Looking at values of `report.state` or `report.metrics` waits for it, so a callback does that
    only when it is due.
    """


class Profile(Protocol):
  """Watches the steps from `first` to `last`; see `planning.profile.Window`."""

  first: int
  last: int

  def start(self, hlo_text_of_program: str):
    """Called before the first one is launched."""

  def stop(self):
    """Called when the last one is done."""


def _go_on() -> str:
  return ''


def run(
  reports: Iterator[StepReport],
  callbacks: Sequence[Callback],
  *,
  num_steps: int,
  stop_requested: Callable[[], str] = _go_on,
) -> StepReport | None:
  """Takes steps until `num_steps` are done or a stop is requested; calls all callbacks after each.

  Args:
    reports: of `steps`.
    callbacks: called in this order.
    num_steps: optimizer steps of the whole run.
    stop_requested: called once per step; the name of a signal, or '' to go on. All processes of a
      run must be told the same.

  Returns:
    The last report; None if there was no step to take.
  """
  report = None
  for report in reports:
    # Asked once and before all callbacks, since a signal may come during any of them.
    report = report._replace(complete=report.step == num_steps, stopped_by=stop_requested())
    for callback in callbacks:
      callback.after_step(report)
    if report.last:
      break
  return report


def _num_tokens(batch: trees.Batch) -> int:
  return batch['tokens'].size


def steps(
  train_step: Any,
  state: trees.Tree,
  batches: Iterator[trees.HostBatch],
  *,
  mesh: jax.sharding.Mesh,
  put: Callable[[trees.HostBatch], trees.Batch],
  timer: step_timer.StepTimer,
  profile: Profile | None = None,
  num_tokens: Callable[[trees.Batch], int] = _num_tokens,
) -> Iterator[StepReport]:
  """Runs one optimizer step per batch, a few steps ahead of the device, and yields after each.

  The yielded state is donated to the next step: use it before asking for the next report. The next
  batch is asked for after that, so it may depend on what was done with the report.

  Args:
    train_step: the jitted step, (state, batch) -> (state, metrics); traced under `mesh`. Each shape
      of a batch is compiled when it first comes.
    state: of the first step; `step` is [] int32, or [S] for S seeds that run in step.
    batches: of this process, one per step; the loop ends with them.
    mesh: devices of all processes.
    put: lays a batch of this process onto the mesh.
    timer: is told the tokens and the time of waiting; compiling, starting a profile and reading it
      are left out.
    profile: the steps to profile.
    num_tokens: of a batch on the mesh.
  """
  compiled = {}
  in_flight = collections.deque()
  step = int(np.ravel(state.step)[0])  # of several seeds all are the same
  while True:
    with timer.waiting():
      host_batch = next(batches, None)
    if host_batch is None:
      return
    batch = put(host_batch)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
    with partitioning.activate(mesh):
      if shapes not in compiled:
        with timer.paused('compile'):
          compiled[shapes] = train_step.lower(state, batch).compile()
      if profile is not None and step + 1 == profile.first:
        with timer.paused():
          profile.start(compiled[shapes].as_text())
      state, metrics = compiled[shapes](state, batch)
    step += 1
    if profile is not None and step == profile.last:
      jax.block_until_ready((state, metrics))  # these steps' time counts, that of reading does not
      with timer.paused():
        profile.stop()
    in_flight.append(metrics.loss)
    if len(in_flight) > MAX_IN_FLIGHT:
      in_flight.popleft().block_until_ready()
    timer.add_tokens(num_tokens(batch))
    yield StepReport(step, state, metrics)
