"""When one process ends, the others end too, at once and with a sentence that names it.

JAX notices a dead process by its missing heartbeats, after `--heartbeat_timeout`, and then aborts
the others with a page of stack traces. But the connections of the rendezvous are there anyway: the
system closes those of a killed process within milliseconds, and whoever ends for a reason can say
it. So process 0 keeps one connection to each of the others, and passes on what it hears. A machine
that loses its network says nothing; that is left to the heartbeats.
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


class Watchdog:
  """This process's connections, watched by a thread until `finish` or `fail`.

  Args:
    number: process id.
    hosts: of all processes, by process id.
    connections: process 0: to every other process; the others: to process 0.
  """

  def __init__(self, number: int, hosts: Sequence[str], connections: Mapping[int, socket.socket]):
    self._number, self._hosts, self._connections = number, list(hosts), dict(connections)
    self._over = threading.Event()
    for connection in self._connections.values():
      connection.settimeout(_GRACE_SECONDS)
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

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

  def _watch(self):
    with selectors.DefaultSelector() as selector:
      for number, connection in self._connections.items():
        selector.register(connection, selectors.EVENT_READ, number)
      while selector.get_map():
        for key, _ in selector.select():
          last_words = self._listen(self._connections[key.data])
          selector.unregister(key.fileobj)
          if last_words != '' and not self._over.is_set():
            self._give_up(key.data, last_words)

  def _listen(self, connection: socket.socket) -> str | None:
    """'' from a process that finished, why it failed, or None where it fell silent."""
    message = bytearray()
    try:
      while not message.endswith(b'\n'):
        part = connection.recv(65536)
        if not part:
          return None
        message += part
      return str(json.loads(message))
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
    line = json.dumps(sentence).encode() + b'\n'
    for connection in self._connections.values():
      with contextlib.suppress(OSError):  # gone already
        connection.sendall(line)

  def _exit(self, status: int, seconds: float):
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # a reader that has gone must not keep this process here
        stream.flush()
    time.sleep(seconds if self._number else _FIRST_GRACE_SECONDS)
    os._exit(status)
