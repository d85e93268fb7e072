"""SIGTERM, SIGINT and SIGHUP as a request that the training loop reads between steps."""

import contextlib
import os
import signal
import threading
from types import FrameType

from absl import logging

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
  """Turns the first signal into a name that the loop reads between steps.

  Later signals change nothing: an exception in the middle of compiling or saving would lose what
  the first one is about to save. SIGQUIT and SIGKILL end a program at once. SIGHUP stays
  ignored where it was (`nohup`). Python lets the main thread alone handle signals, so that a run
  in another thread is not stopped by them.
  """

  def __init__(self):
    self.name = ''
    self._old = {}

  def __enter__(self) -> 'StopSignal':
    if threading.current_thread() is not threading.main_thread():
      logging.warning(
        'Training runs in a thread that is not the main one, where signals cannot be handled: '
        'SIGTERM and Ctrl-C do not save the step they come in.'
      )
      return self
    for number in SIGNALS:
      if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        continue
      self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, unused_frame: FrameType | None):
    if self.name:
      return
    self.name = signal.Signals(number).name
    line = (
      f'\n{self.name}: the run ends after the step in progress and saves it (Ctrl-\\ ends now)\n'
    )
    with contextlib.suppress(OSError):  # a terminal that has gone is why SIGHUP comes
      os.write(2, line.encode())
