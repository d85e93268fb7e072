"""The training loop: one optimizer step per batch, a few steps ahead of the device.

A run resumes by these rules:
  1. The newest whole checkpoint decides the step; metrics past it are dropped, and the steps are
  redone. 2. The batch at step n is a pure function of (seed, n), so n is all the data pipeline
  needs. 3. State and batch being equal, the redone steps are bit-identical on the same hardware.
"""

import collections
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from moe_jax.balance import router_stats
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.training import optimizer_step, step_timer, train_state

Array = jax.Array
Batch = dict[str, Array]

BATCH_KEYS = ('tokens', 'targets', 'positions', 'segment_ids')

# Steps the host may run ahead of the device: enough to keep it busy, few enough that waiting for
# data is seen as waiting.
MAX_IN_FLIGHT = 2


class StopSignal:
  """Turns SIGTERM and SIGINT into a flag that the loop reads between steps.

  A second signal ends the program at once, as the first would have without this.
  """

  def __init__(self):
    self.name = ''

  def __enter__(self) -> 'StopSignal':
    self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, unused_frame: Any):
    if self.name:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name


class Profile(Protocol):
  """Watches the steps from `first` to `last`; see `analysis.profile.Window`."""

  first: int
  last: int

  def start(self, hlo_text_of_program: str):
    """Called before the first one is launched."""

  def stop(self):
    """Called when the last one is done."""


class StepReport(NamedTuple):
  """What the loop hands to its caller after each step."""

  step: int  # optimizer steps done, this one included
  state: train_state.TrainState
  metrics: optimizer_step.StepMetrics


def steps(
  cfg: schema.Config,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  batches: Iterator[dict[str, np.ndarray]],
  timer: step_timer.StepTimer,
  profile: Profile | None = None,
  *,
  train_step: Any = None,
  put: Callable[[Batch, jax.sharding.Mesh], Batch] = partitioning.put_batch,
) -> Iterator[StepReport]:
  """Runs one optimizer step per batch, a few steps ahead of the device, and yields after each.

  The yielded state is donated to the next step: use it before asking for the next report. Each
  batch size of a ramp is compiled when it first comes, and `timer` leaves that time out, as
  it does that of starting and reading a profile. `seeds` has a `train_step` and a `put` of its own:
  the jitted step, and what lays a batch of this process onto the mesh.
  """
  train_step = train_step or optimizer_step.make_train_step(cfg, mesh)
  compiled = {}
  in_flight = collections.deque()
  step = int(np.ravel(state.step)[0])  # of several seeds all are the same
  while True:
    with timer.waiting():
      host_batch = next(batches, None)
    if host_batch is None:
      return
    batch = put({key: host_batch[key] for key in BATCH_KEYS}, mesh)
    shape = batch['tokens'].shape
    with partitioning.activate(mesh):
      if shape not in compiled:
        with timer.paused():
          compiled[shape] = train_step.lower(state, batch).compile()
      if profile is not None and step + 1 == profile.first:
        with timer.paused():
          profile.start(compiled[shape].as_text())
      state, metrics = compiled[shape](state, batch)
    step += 1
    if profile is not None and step == profile.last:
      jax.block_until_ready((state, metrics))  # these steps' time counts, that of reading does not
      with timer.paused():
        profile.stop()
    in_flight.append(metrics.loss)
    if len(in_flight) > MAX_IN_FLIGHT:
      in_flight.popleft().block_until_ready()
    timer.add_tokens(batch['tokens'].size)
    yield StepReport(step, state, metrics)


def host_metrics(metrics: optimizer_step.StepMetrics) -> dict[str, float | None]:
  """Waits for a step and returns its scalars; those of routing are None for a dense model.

  Keys: loss, mtp_loss (None without multi-token prediction), lr, grad_norm, aux_loss, max_vio,
  drop_rate (means over the layers) and overflow_rate, the share of all chosen assignments that did
  not fit the buffers of the exchange.
  """
  stats = metrics.stats
  stats = None if stats is None else (stats.sums.load, stats.dropped, stats.overflow)
  scalars = (metrics.loss, metrics.mtp_loss, metrics.lr, metrics.grad_norm, metrics.aux_loss)
  (loss, mtp_loss, lr, grad_norm, aux), stats = jax.device_get((scalars, stats))
  max_vio = drop_rate = overflow = None
  if stats is not None:
    load, dropped, lost = (np.asarray(a, np.float64) for a in stats)
    overflow = float(lost.sum() / max(load.sum(), 1))
    max_vio = float(router_stats.max_vio(load).mean())
    drop_rate = float((dropped.sum(-1) / np.maximum(load.sum(-1), 1)).mean())
  return {
    'loss': float(loss),
    'mtp_loss': None if mtp_loss is None else float(mtp_loss),
    'lr': float(lr),
    'grad_norm': float(grad_norm),
    'aux_loss': None if stats is None else float(aux),
    'max_vio': max_vio,
    'drop_rate': drop_rate,
    'overflow_rate': overflow,
  }
