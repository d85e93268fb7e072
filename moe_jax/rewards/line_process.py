"""A process that answers a line of JSON with another, within a time that is kept from here."""

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any


class DiedError(Exception):
  """The process has ended by itself."""


class TimeOverError(Exception):
  """The process has not answered in time."""


class LineProcess:
  """One such process."""

  def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]):
    """Starts it, in a session of its own: Ctrl-C ends this process, and this process that one."""
    self._process = subprocess.Popen(
      list(arguments),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=dict(environment),
      start_new_session=True,
    )
    self._rest = b''

  def send(self, request: Mapping[str, Any]):
    """Sends a request.

    Raises:
      DiedError: the process has ended.
    """
    assert self._process.stdin is not None
    try:
      self._process.stdin.write(json.dumps(request).encode() + b'\n')
      self._process.stdin.flush()
    except BrokenPipeError as e:
      raise self._died() from e

  def receive(self, seconds: float) -> dict[str, Any]:
    """The next answer.

    Raises:
      DiedError: the process has ended.
      TimeOverError: it has not answered.
    """
    until = time.monotonic() + seconds
    assert self._process.stdout is not None
    handle = self._process.stdout.fileno()
    while b'\n' not in self._rest:
      ready, _, _ = select.select([handle], [], [], max(until - time.monotonic(), 0.0))
      if not ready:
        raise TimeOverError(f'no answer within {seconds:g} s')
      read = os.read(handle, 2**16)
      if not read:
        raise self._died()
      self._rest += read
    line, _, self._rest = self._rest.partition(b'\n')
    return json.loads(line)

  def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The answer to a request; raises as `send` and `receive`."""
    self.send(request)
    return self.receive(seconds)

  def close(self, seconds: float):
    """Lets the process come to its end, and ends it if it has not by then."""
    assert self._process.stdin is not None
    try:
      self._process.stdin.close()
      self._process.wait(seconds)
    except (BrokenPipeError, subprocess.TimeoutExpired):
      self._process.kill()
    self.kill()

  def kill(self):
    """Ends the process, whatever it does."""
    self._process.kill()
    self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout):
      assert pipe is not None
      try:
        pipe.close()
      except BrokenPipeError:  # a request that nobody will read
        continue

  def _died(self) -> DiedError:
    return DiedError(f'it ended with status {self._process.wait()}')
