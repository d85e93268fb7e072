"""Says in which phase a run hangs when nothing in it goes on, with the stacks of all threads.

A hang is otherwise silent: a collective that one process never joins, a file system that does not
answer, a data source that waits. Nothing is ended here; a process that died is the affair of
`processes.watchdog`.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from moe_jax.training import step_timer

_LOOKS = 10  # at the clock, in the time after which something is said


class StallWatch:
  """Watches a timer's phase from a thread of its own, while it is entered.

  Args:
    timer: changes its phase as the run goes on.
    seconds: without a step, and in the same phase, after which it says so, and again every such
      time; 0 never.
    clock: that of the timer.
    out: where to; a real file, since the stacks are written by the system.
  """

  def __init__(
    self,
    timer: step_timer.StepTimer,
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    out: IO[str] | None = None,
  ):
    self._timer, self._seconds, self._clock, self._out = timer, seconds, clock, out
    self._over, self._told = threading.Event(), (0.0, 0)

  def __enter__(self) -> 'StallWatch':
    if self._seconds:
      threading.Thread(target=self._watch, name='stall-watch', daemon=True).start()
    return self

  def __exit__(self, *unused):
    self._over.set()

  def _watch(self):
    while not self._over.wait(self._seconds / _LOOKS):
      self.look()

  def look(self) -> bool:
    """Says that the run hangs if it does and that was not said yet; returns whether it did."""
    phase = self._timer.phase
    idle = self._clock() - phase.since
    told = (phase.since, int(idle // self._seconds))
    if idle < self._seconds or told == self._told:
      return False
    self._told = told
    out = self._out or sys.__stderr__
    if out is None:  # a program without a terminal
      return False
    out.write(
      f'warning: nothing has gone on for {idle:.0f} s (config.train.stall_seconds='
      f'{self._seconds:g}); process {os.getpid()} is in phase {phase.name!r} of '
      f'{", ".join(step_timer.PHASES)}, and waits on; the stacks of its threads:\n'
    )
    out.flush()
    faulthandler.dump_traceback(out, all_threads=True)
    return True
