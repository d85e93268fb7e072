"""SIGTERM and SIGINT as a request that the training loop reads between steps."""

import signal
from types import FrameType


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

  def _handle(self, number: int, unused_frame: FrameType | None):
    if self.name:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name
