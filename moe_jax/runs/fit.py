"""The training loop of a run, or of several seeds as one state, with all of its actions."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import paths, schema
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import peak_flops
from moe_jax.planning import flops
from moe_jax.processes import agreement
from moe_jax.runs import goodput, loop_actions, nonfinite_guard, stall_watch, trained_run
from moe_jax.training import loop, optimizer_step, stop_signal, train_state
from moe_jax.training import step_timer as step_timer_lib


class Stage(Protocol):
  """A stage whose batches depend on the weights of the moment, as answers of the model's own do."""

  def batches(
    self,
    state: train_state.TrainState,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizer_lib.Tokenizer,
    workdir: pathlib.Path,
    say: trained_run.Say,
  ) -> Generator[trees.HostBatch, None, None]:
    """The batch of every step from `state` on, whole on every process."""
    ...

  def after_step(self, report: loop.StepReport):
    """The first callback after a step."""

  def may_stop(self) -> bool:
    """Whether the run may end after the step that is being taken."""
    ...

  def scalars(self, metrics: Any) -> Mapping[str, float | None]:
    """What is logged of a step."""
    ...


def fit(
  members: Sequence[loop_actions.Member],
  train_step: Any,
  state: train_state.TrainState,
  batches: Generator[trees.HostBatch, None, None],
  *,
  mesh: jax.sharding.Mesh,
  put: Callable[[trees.HostBatch], trees.Batch],
  checkpointer: checkpointer_lib.Checkpointer,
  meta: trees.Json,
  stop: stop_signal.StopSignal,
  say: trained_run.Say,
  began: float,
  profile: loop.Profile | None = None,
  stage: Stage | None = None,
) -> tuple[train_state.TrainState, str]:
  """Trains to the end or to a signal, and saves the last state.

  All processes do the same, step by step; only writing is left to the first.

  Args:
    members: what is trained: one run, or seeds that differ in nothing else.
    train_step: see `loop.steps`, as `state`, `mesh`, `put` and `profile`.
    state: of all members.
    batches: of all members, from the state's step on; closed at the end.
    mesh: devices of all processes.
    put: lays a batch onto the mesh.
    checkpointer: for the state.
    meta: saved with it.
    stop: this process's signals.
    say: prints one line.
    began: `time.perf_counter()` when this start of the run began.
    profile: the steps to profile.
    stage: where the batches come from, if they depend on the weights of the moment.

  Returns:
    (the last state, which is saved; the name of the signal that ended the run early, or '').
  """
  cfg = members[0].cfg
  train, timer = cfg.train, step_timer(cfg)
  spent = goodput.begin(members[0].workdir, time.perf_counter() - began)
  start = int(jnp.ravel(state.step)[0])  # of several seeds all are the same
  stops = agreement.StopAgreement(mesh, loop.MAX_IN_FLIGHT)
  between_batches = agreement.StopAgreement(mesh, 0)

  def is_logged(step: int) -> bool:
    return loop_actions.is_due(step, train.log_every)

  workdirs = [one.workdir for one in members] if agreement.is_first() else []
  times = goodput.Goodput(workdirs, timer, spent, is_logged, checkpointer.is_due)
  watch = stall_watch.StallWatch(timer, train.stall_seconds)
  recent = nonfinite_guard.RecentBatches(batches, start, nonfinite_guard.num_kept(cfg))
  bar = loop_actions.ProgressBar(start, train.num_steps)
  with contextlib.closing(recent), bar, watch:
    scalars = optimizer_step.host_metrics if stage is None else stage.scalars
    actions: list[Any] = [
      *([] if stage is None else [stage]),
      bar,
      loop_actions.LogMetrics(members, train.log_every, scalars, timer, bar, say),
      nonfinite_guard.NonfiniteGuard(
        members, recent, put, lambda step: is_logged(step) or checkpointer.is_due(step)
      ),
      loop_actions.WriteRoutingFigures(members, train.routing_every, timer),
      # Saves first: an evaluation may take longer than a machine waits after SIGTERM.
      loop_actions.SaveCheckpoint(members, checkpointer, meta, timer),
      loop_actions.EvaluateMidway(
        members, train.eval_every, mesh, timer, say, lambda: between_batches.after_step(stop.name)
      ),
      times,
    ]

    def stop_requested() -> str:
      signal_name = stops.after_step(stop.name)
      return signal_name if stage is None or stage.may_stop() else ''

    last = loop.run(
      loop.steps(train_step, state, recent, mesh=mesh, put=put, timer=timer, profile=profile),
      actions,
      num_steps=train.num_steps,
      stop_requested=stop_requested,
    )
  with timer.saving():
    checkpointer.wait()
  if last is None:
    return state, ''
  times.write(saved=True)
  if last.complete:
    return last.state, ''
  say(goodput.text(times.seconds()))
  return last.state, last.stopped_by


def step_timer(cfg: schema.Config) -> step_timer_lib.StepTimer:
  """The clock of the first process; the others' is never looked at, so it measures no peak."""
  peak = math.inf
  if agreement.is_first():
    peak = peak_flops.matmul_peak(cfg.model.dtype, paths.cache_root(cfg.data.cache_dir))
  return step_timer_lib.StepTimer(flops.train_flops_per_token(cfg.model), peak)
