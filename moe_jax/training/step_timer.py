"""Throughput between two log lines: tokens per second, MFU, shares of waiting and saving.

Model FLOPs utilisation (MFU) is measured against what a plain square matmul reaches on the device
at hand (`peak_flops.matmul_peak`), not against a data sheet.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

_Path = str | os.PathLike[str]


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
    self._restart()

  def add_tokens(self, tokens: int):
    """Counts the tokens of one global batch."""
    self._tokens += tokens

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around `next(batches)`: the time inside counts as waiting for data."""
    start = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - start

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Around saving, once the steps in flight are done: like `paused`, and it is reported."""
    start = self._clock()
    try:
      with self.paused():
        yield
    finally:
      self._saved += self._clock() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around compilation and evaluation: the time inside does not count at all."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

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
