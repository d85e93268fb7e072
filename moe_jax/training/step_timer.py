"""Throughput between two log lines, and where the time of a run goes: its phases.

Model FLOPs utilisation (MFU) is measured against what a plain square matmul reaches on the device
at hand (`peak_flops.matmul_peak`), not against a data sheet.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

_Path = str | os.PathLike[str]


PHASES: tuple[str, ...] = ('steps', 'data', 'compile', 'saving', 'evaluation', 'other')


class Phase(NamedTuple):
  """What a run does, and since when: the clock at the last step, or at the phase's beginning."""

  name: str  # one of PHASES
  since: float


class StepTimer:
  """Throughput between two log lines.

  Call `report` after a value of the last step was fetched: steps are dispatched asynchronously, and
  the clock should include their work.

  Args:
    flops_per_token: training FLOPs of the model per token.
    peak: FLOP/s of all devices, from `matmul_peak`.
    clock: seconds, monotonic.
  """

  def __init__(
    self, flops_per_token: float, peak: float, *, clock: Callable[[], float] = time.perf_counter
  ):
    self._flops_per_token, self._peak, self._clock = flops_per_token, peak, clock
    self._trained, self._saved = 0.0, 0.0
    self._seconds, self._counted = dict.fromkeys(PHASES, 0.0), clock()
    self.phase = Phase('steps', self._counted)  # set whole, since another thread reads it
    self._restart()

  def add_tokens(self, tokens: int):
    """Counts the tokens of one global batch; its step has been launched."""
    self._tokens += tokens
    self._enter('steps')

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around `next(batches)`: the time inside counts as waiting for data."""
    start = self._clock()
    try:
      with self._in('data'):
        yield
    finally:
      self._waited += self._clock() - start

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Around saving, once the steps in flight are done: like `paused`, and it is reported."""
    start = self._clock()
    try:
      with self.paused('saving'):
        yield
    finally:
      self._saved += self._clock() - start

  @contextlib.contextmanager
  def paused(self, phase: str = 'other') -> Iterator[None]:
    """Around compilation and evaluation: the time inside does not count as training."""
    start = self._clock()
    try:
      with self._in(phase):
        yield
    finally:
      self._paused += self._clock() - start

  def seconds(self) -> dict[str, float]:
    """How long the run has been in each of `PHASES` so far."""
    self._count()
    return dict(self._seconds)

  @contextlib.contextmanager
  def _in(self, name: str) -> Iterator[None]:
    outer = self.phase.name
    self._enter(name)
    try:
      yield
    finally:
      self._enter(outer)

  def _enter(self, name: str):
    self._count()
    self.phase = Phase(name, self._counted)

  def _count(self):
    now = self._clock()
    self._seconds[self.phase.name] += now - self._counted
    self._counted = now

  def report(self) -> dict[str, float]:
    """`tokens_per_second`, `mfu` and `data_wait_share` since the last report; starts anew.

    Saves are many reports apart: `save_stall_share` is of all training and saving so far.
    """
    seconds = max(self._clock() - self._start - self._paused, 1e-9)
    self._trained += seconds
    tokens_per_second = self._tokens / seconds
    report = {
      'tokens_per_second': tokens_per_second,
      'mfu': tokens_per_second * self._flops_per_token / self._peak,
      'data_wait_share': min(self._waited / seconds, 1.0),
      'save_stall_share': self._saved / (self._trained + self._saved),
    }
    self._restart()
    return report

  def _restart(self):
    self._start, self._tokens, self._waited, self._paused = self._clock(), 0, 0.0, 0.0
