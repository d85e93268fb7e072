"""Ends a run whose steps stay not finite, and keeps what `experiments.replay_step` needs.

A step whose loss or gradient is not finite is skipped on the devices (`training.skipped_steps`).
Once more than `train.max_skipped_steps` in a row were, the devices leave the state alone, so that
it is still that of the first of them when the guard finds out, some steps behind.
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from moe_jax import errors, trees
from moe_jax.config import batch_sizes
from moe_jax.processes import agreement
from moe_jax.runs import loop_actions, nonfinite_dump
from moe_jax.training import loop


class RecentBatches:
  """Passes a run's batches on and keeps the last of them, by step.

  Args:
    batches: of the steps from `start` on; closed with this.
    start: steps done before the first of them.
    keep: how many to keep.
  """

  def __init__(self, batches: Generator[trees.HostBatch, None, None], start: int, keep: int):
    self._batches, self._numbers = batches, itertools.count(start + 1)
    self._kept: collections.deque[tuple[int, trees.HostBatch]] = collections.deque(maxlen=keep)

  def __iter__(self) -> 'RecentBatches':
    return self

  def __next__(self) -> trees.HostBatch:
    batch = next(self._batches)
    self._kept.append((next(self._numbers), batch))
    return batch

  def since(self, step: int) -> tuple[int, trees.HostBatch]:
    """(number of the step, its batch) of the first kept one that is not before `step`."""
    return next(one for one in self._kept if one[0] >= step)

  def close(self):
    """Ends the threads that read ahead."""
    self._batches.close()


def num_kept(cfg: Any) -> int:
  """Batches that must be kept, for the first of the steps in a row to be among them."""
  return cfg.train.max_skipped_steps + 1 + loop.MAX_IN_FLIGHT + 1


@dataclasses.dataclass
class NonfiniteGuard:
  """The callback: looks at every step's count of skipped steps once the loop has waited for it."""

  members: Sequence[loop_actions.Member]
  batches: RecentBatches
  put: Callable[[trees.HostBatch], trees.Batch]
  is_due: Callable[[int], bool]  # whether another callback looks at the values of that step anyway
  _waiting: collections.deque[tuple[int, Any]] = dataclasses.field(
    default_factory=collections.deque
  )

  def after_step(self, report: loop.StepReport):
    """Raises errors.InputError where a member skipped too many steps in a row."""
    self._waiting.append((report.step, report.metrics))
    behind = 0 if report.last or self.is_due(report.step) else loop.MAX_IN_FLIGHT
    while len(self._waiting) > behind:
      step, metrics = self._waiting.popleft()
      in_row = np.asarray(metrics.skipped.in_row)
      for one in self.members:
        if int(one.take(in_row)) > one.cfg.train.max_skipped_steps:
          self._stop(one, step, int(one.take(in_row)), metrics, report.state)

  def _stop(self, one: loop_actions.Member, step: int, in_row: int, metrics: Any, state: Any):
    loss, norm = (float(value) for value in one.take((metrics.loss, metrics.grad_norm)))
    first, batch = self.batches.since(step - in_row + 1)
    rows = _rows(one, first)
    figures = {'step': first, 'rows': rows, 'last_step': step, 'loss': loss, 'grad_norm': norm}
    batch = one.take(agreement.fetch(self.put(batch)))
    directory = one.workdir / 'nonfinite' / str(first)
    kept = _kept(directory, lambda: nonfinite_dump.write(directory, one, figures, state, batch))
    optim_cfg, most = one.cfg.optim, one.cfg.train.max_skipped_steps
    raise errors.InputError(
      f'{one.label}loss {loss} and gradient norm {norm} at step {step}: training diverged with '
      f'config.optim.peak_lr={optim_cfg.peak_lr} and clip_norm={optim_cfg.clip_norm}, or its '
      f'weights or rows are bad; {in_row} steps in a row were skipped from step {first} (rows '
      f'{rows[0]} to {rows[1]} of the row stream) on, and config.train.max_skipped_steps={most}. '
      f'{kept}. Then lower the rate or lengthen config.optim.warmup_steps; the checkpoints before '
      'it are whole'
    )


def _rows(one: loop_actions.Member, step: int) -> tuple[int, int]:
  """The first and the last row of a step's batch, counted over the whole run."""
  sizes = batch_sizes.of(one.cfg.train)
  begin = one.stream.first_row(sizes, step - 1)
  return begin, begin + sizes.at(step - 1) - 1


def _kept(directory: pathlib.Path, write: Callable[[], None]) -> str:
  """Writes the dump; a sentence about it, since a full disk must not hide why the run ends."""
  try:
    write()
  except Exception as e:
    return f'The dump to {directory} failed ({type(e).__name__}: {str(e).strip()[:200]})'
  return (
    f'State and batch are in {directory}: see which module is not finite with python -m '
    f'experiments.replay_step --workdir={directory.parents[1]}'
  )
