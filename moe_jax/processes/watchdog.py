"""When one process ends, the others end too, at once and with a sentence that names it.

JAX notices a dead process by its missing heartbeats, after `--heartbeat_timeout`, and then aborts
the others with a page of stack traces. But the connections of the rendezvous are there anyway: the
system closes those of a killed process within milliseconds, and whoever ends for a reason can say
it. So process 0 keeps one connection to each of the others, and passes on what it hears. Over the
same connections every process says that it is alive: one that is frozen, or whose machine has lost
its network, is named before JAX would abort.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence

# What a process that hears of a failure waits before it ends: its own main thread may be about to
# report the same bad input, in better words. Process 0 waits longer, because JAX aborts the others
# when it goes.
_GRACE_SECONDS, _FIRST_GRACE_SECONDS = 1.0, 2.0
_DELIVERY_SECONDS = 0.1
_FAILED = 1  # exit status that lets a scheduler start the job again
_ALIVE = b'.'
_BEATS = 8  # in the time after which silence is an end


class Watchdog:
  """This process's connections, watched by a thread until `finish` or `fail`.

  Args:
    number: process id.
    hosts: of all processes, by process id.
    connections: process 0: to every other process; the others: to process 0.
    heartbeat_timeout: seconds after which a silent process is taken for dead.
  """

  def __init__(
    self,
    number: int,
    hosts: Sequence[str],
    connections: Mapping[int, socket.socket],
    heartbeat_timeout: float = 100.0,
  ):
    self._number, self._hosts, self._connections = number, list(hosts), dict(connections)
    self._silence = heartbeat_timeout
    self._over = threading.Event()
    self._sending = threading.Lock()
    for connection in self._connections.values():
      connection.settimeout(_GRACE_SECONDS)
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for work in (self._watch, self._beat):
      threading.Thread(target=work, name='watchdog', daemon=True).start()

  def finish(self):
    """Says that this process ends as it should."""
    self._over.set()
    self._tell('')

  def fail(self, reason: str, status: int):
    """Tells the others why this process ends, and ends it without waiting for them.

    The caller has said the reason already. JAX's own way out would wait for processes that wait for
    this one.
    """
    if not self._over.is_set():
      self._over.set()
      self._tell(f'{self._name(self._number)} ended: {reason}')
    self._exit(status, _DELIVERY_SECONDS)

  def _beat(self):
    """Says that this process is alive, until it ends."""
    while not self._over.wait(self._silence / _BEATS):
      self._send(_ALIVE + b'\n')

  def _watch(self):
    heard = dict.fromkeys(self._connections, time.monotonic())
    with selectors.DefaultSelector() as selector:
      for number, connection in self._connections.items():
        selector.register(connection, selectors.EVENT_READ, number)
      before = time.monotonic()
      while selector.get_map():
        for key, _ in selector.select(self._silence / _BEATS):
          heard[key.data] = time.monotonic()
          last_words = self._listen(self._connections[key.data])
          if isinstance(last_words, bytes):  # _ALIVE
            continue
          selector.unregister(key.fileobj)
          del heard[key.data]
          if last_words != '' and not self._over.is_set():
            self._give_up(key.data, last_words)
        now = time.monotonic()
        if now - before > self._silence / 2:  # this process was frozen itself, and has not listened
          heard = dict.fromkeys(heard, now)
        before = now
        self._check_silence({number: now - then for number, then in heard.items()})

  def _check_silence(self, seconds: Mapping[int, float]):
    """Ends this process if another one has been silent for too long."""
    for number, silent in seconds.items():
      if silent > self._silence and not self._over.is_set():
        self._give_up(
          number,
          f'{self._name(number)} has not answered for {silent:.0f} s: it is frozen, or its machine '
          'is overloaded or cut off',
        )

  def _listen(self, connection: socket.socket) -> str | bytes | None:
    """What another process said last.

    Returns:
      _ALIVE, '' from one that finished, why it failed, or None if its connection broke.
    """
    message = bytearray()
    try:
      while not message.endswith(b'\n'):
        part = connection.recv(65536)
        if not part:
          return None
        message += part
      words = [line for line in message.splitlines() if line != _ALIVE]
      return str(json.loads(words[0])) if words else _ALIVE
    except (OSError, ValueError):
      return None

  def _give_up(self, number: int, last_words: str | None):
    if last_words is None:
      sentence = f'{self._name(number)} was killed or has crashed, see its own output'
    else:
      sentence = last_words
      if self._over.wait(_GRACE_SECONDS):
        return
    self._over.set()
    if last_words is not None or self._number == 0:
      self._tell(sentence)
    again = 'start all processes again to go on from the newest checkpoint'
    os.write(2, f'error: {" ".join(sentence.split())}; {again}\n'.encode())
    self._exit(_FAILED, 0.0)

  def _name(self, number: int) -> str:
    return f'process {number} ({self._hosts[number]})'

  def _tell(self, sentence: str):
    """Process 0 tells everyone, the others tell process 0."""
    self._send(json.dumps(sentence).encode() + b'\n')

  def _send(self, line: bytes):
    with self._sending:
      for connection in self._connections.values():
        with contextlib.suppress(OSError):  # gone already
          connection.sendall(line)

  def _exit(self, status: int, seconds: float):
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # a reader that has gone must not keep this process here
        stream.flush()
    time.sleep(seconds if self._number else _FIRST_GRACE_SECONDS)
    os._exit(status)
