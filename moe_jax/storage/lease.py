"""One writer per folder of a bucket: a numbered object that its owner renews.

`FOLDER/.lease/N` holds owner and end of the lease, and who holds the highest number may write. An
object is made only if there is none of its name (`ifGenerationMatch=0`, `If-None-Match: *`), so of
two that want the next number one gets it. A lease that was not renewed in time, or whose process
is known here to have ended, is taken over by making the next number and deleting the old one. An
owner looks before each upload whether it still holds the highest number, and ends if not.

Times are those of the writers' clocks, which must agree within SECONDS - EVERY.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from moe_jax import atomic_files, errors
from moe_jax.storage import bucket as bucket_lib
from moe_jax.storage import urls

DIRECTORY = '.lease'
SECONDS = 120.0  # from a renewal on
EVERY = 20.0  # seconds between renewals


class Claim(NamedTuple):
  """What a lease object holds."""

  host: str
  process: int
  machine: str  # '' where processes of the same machine cannot be told from others
  until: float  # seconds since 1970


class LostError(errors.InputError):
  """Another process holds the lease by now."""


def next_number(claims: Mapping[int, Claim], now: float, machine: str, where: str) -> int:
  """The number to make.

  Args:
    claims: by number.
    now: seconds since 1970.
    machine: this one, see `Claim`.
    where: how messages begin.

  Raises:
    errors.InputError: the lease is held.
  """
  if not claims:
    return 1
  newest = claims[max(claims)]
  ended = bool(machine) and newest.machine == machine and not atomic_files.is_alive(newest.process)
  left = newest.until - now
  errors.require(
    ended or left <= 0,
    f'{where} is being written by process {newest.process} of {newest.host!r}; wait for it or stop '
    f'it, or use another folder; if it was killed, it is free in {left:.0f} s',
  )
  return max(claims) + 1


def _machine() -> str:
  """What the processes that this one can see share: a boot of a machine, and a container on it."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # another system than Linux
    return ''


class Lease:
  """A lease that is held, and renewed in a thread.

  Args:
    client: of the bucket.
    url: the folder.
    where: how messages begin.
    on_loss: called in the thread, once, when another process has taken the lease over.
  """

  def __init__(
    self,
    client: bucket_lib.Bucket,
    url: urls.Url,
    where: str,
    on_loss: Callable[[], None] = lambda: None,
  ):
    self._client, self._where, self._on_loss = client, where, on_loss
    self._folder = url.below(DIRECTORY).key
    self._number = next_number(self._claims(), time.time(), _machine(), where)
    made = client.create(self._key(self._number), self._text())
    numbers = self._numbers()
    if not made or max(numbers, default=0) != self._number:
      if made:
        client.delete([self._key(self._number)])
      raise errors.InputError(
        f'{where} was just taken by another process; stop one of the two, or use another folder'
      )
    client.delete([self._key(n) for n in numbers if n < self._number])
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)
    self._thread.start()

  def check(self):
    """Makes sure that no other process has taken over.

    Raises:
      LostError: one has.
      errors.InputError: the bucket cannot be read.
    """
    numbers = self._numbers()
    if max(numbers, default=0) != self._number:
      raise LostError(
        f'{self._where} was taken over by another process, because this one did not renew its '
        f'lease for {SECONDS:.0f} s; what it has not uploaded is not in the bucket'
      )

  def close(self):
    """Gives the lease back."""
    self._ended.set()
    self._thread.join()
    if self._number in self._numbers():
      self._client.delete([self._key(self._number)])

  def _renew(self):
    while not self._ended.wait(EVERY):
      try:
        self.check()
        self._client.write(self._key(self._number), self._text())
      except LostError as e:
        logging.error(e)
        self._on_loss()
        return
      except errors.InputError as e:  # until the network is back
        logging.warning(f'the lease was not renewed: {e}')

  def _key(self, number: int) -> str:
    return f'{self._folder}/{number}'

  def _text(self) -> bytes:
    claim = Claim(socket.gethostname(), os.getpid(), _machine(), time.time() + SECONDS)
    return json.dumps(claim._asdict()).encode()

  def _numbers(self) -> list[int]:
    names = (key.rsplit('/', 1)[-1] for key in self._client.find(self._folder))
    return [int(name) for name in names if name.isdecimal()]

  def _claims(self) -> dict[int, Claim]:
    found = {}
    for number in self._numbers():
      text = self._client.read(self._key(number))
      if text is not None:  # deleted since
        found[number] = _parsed(text, f'{self._where}: {self._key(number)}')
    return found


def _parsed(text: bytes, where: str) -> Claim:
  try:
    claim = Claim(**json.loads(text))
    return claim._replace(process=int(claim.process), until=float(claim.until))
  except (ValueError, TypeError) as e:
    raise errors.InputError(f'{where} is no lease ({e}); delete it if no run writes there') from e


@contextlib.contextmanager
def held(
  client: bucket_lib.Bucket, url: urls.Url, where: str, on_loss: Callable[[], None] = lambda: None
) -> Iterator[Lease]:
  """A `Lease` for the time of a block.

  Raises:
    errors.InputError: another process holds it.
  """
  lease = Lease(client, url, where, on_loss)
  try:
    yield lease
  finally:
    lease.close()
