"""Parts of a checkpoint that go from process to process through the bucket of the run.

Machines without a common disk each write a part of every step. Process 0 alone uploads steps, so
the others put their parts at `FOLDER/.parts/START/STEP/PROCESS/...` and then `PROCESS.json`, the
size of each file; process 0 brings them here, compares the sizes, and deletes them there. START
is another token at every start, so what a killed start has left is never mixed in; the next start
deletes it. No reader looks at `.parts`.
"""

import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from moe_jax import errors
from moe_jax.storage import bucket as bucket_lib
from moe_jax.storage import fetch, upload, urls

EVERY = 10.0  # seconds between tries
PATIENCE = 300.0  # seconds without a network after which a save has failed


class Parts:
  """What one of the processes of a run gives or collects.

  Args:
    client: of the bucket.
    url: the folder of the run.
    where: how messages begin.
    start: the token of this start, the same on all processes.
    process: the number of this one.
    processes: how many there are.
  """

  def __init__(
    self,
    client: bucket_lib.Bucket,
    url: urls.Url,
    where: str,
    start: str,
    process: int,
    processes: int,
  ):
    self._client, self._where = client, where
    self._folder = url.below(f'{fetch.PARTS}/{start}')
    self.process, self._processes = process, processes
    self.failure: errors.InputError | None = None  # after which nothing is saved any more

  def check(self):
    """Raises what went wrong with a part, in whatever thread."""
    if self.failure is not None:
      raise self.failure

  def give(self, step: int, folder: pathlib.Path):
    """Uploads this process's part of a step.

    Args:
      step: its name.
      folder: what is in it is the part.

    Raises:
      errors.InputError: the bucket cannot be written for PATIENCE seconds; the run is told to end.
    """
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*') if p.is_file()}
    self._patiently(step, lambda: self._give(step, files))

  def _give(self, step: int, files: Mapping[str, pathlib.Path]):
    objects = {self._key(step, self.process, name): path for name, path in files.items()}
    self._client.put(objects)
    upload.check(self._client.find(self._key(step, self.process)), objects, self._where)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    self._client.write(self._list_key(step, self.process), json.dumps(sizes).encode())

  def collect(self, step: int, folder: pathlib.Path):
    """Brings the parts of all others, who have given them, beside the part of process 0.

    Args:
      step: its name.
      folder: of the part of process 0.

    Raises:
      errors.InputError: a part is not whole, or the bucket cannot be read for PATIENCE seconds;
        the run is told to end.
    """
    self._patiently(step, lambda: self._collect(step, folder))

  def _collect(self, step: int, folder: pathlib.Path):
    sizes = {}  # (process, name) -> bytes
    for process in range(1, self._processes):
      text = self._client.read(self._list_key(step, process))
      text = errors.present(
        text, f'{self._where}: the part of process {process} of step {step} is gone; {_AGAIN}'
      )
      sizes |= {(process, name): size for name, size in json.loads(text).items()}
    files = {(process, name): folder / name for process, name in sizes}
    for path in files.values():
      path.parent.mkdir(parents=True, exist_ok=True)
    self._client.get({self._key(step, *one): path for one, path in files.items()})
    for (process, name), path in files.items():
      size = path.stat().st_size if path.exists() else -1
      errors.require(
        size == sizes[process, name],
        f'{self._where}: {size:,} bytes of {sizes[process, name]:,} came of {name}, a file of '
        f'process {process} of step {step}; {_AGAIN}',
      )
    self._client.delete(list(self._client.find(self._key(step))))

  def _key(self, step: int, *below: Any) -> str:
    return self._folder.below('/'.join(map(str, (step, *below)))).key

  def _list_key(self, step: int, process: int) -> str:
    return self._key(step, f'{process}.json')

  def _patiently(self, step: int, work: Callable[[], None]):
    """Does what needs the network, again and again while it is away."""
    deadline, told = time.monotonic() + PATIENCE, ''
    while True:
      try:
        work()
        return
      except errors.InputError as e:
        if time.monotonic() >= deadline:
          self.failure = e
          stop_run()  # its next save raises this
          raise
        if str(e) != told:
          logging.warning(f'step {step} cannot be saved at the moment: {e}')
        told = str(e)
      time.sleep(EVERY)


_AGAIN = 'start all processes again to go on from the newest checkpoint'


def clear(client: bucket_lib.Bucket, url: urls.Url):
  """Deletes what killed starts of a run have left; its caller holds the lease."""
  client.delete(list(client.find(url.below(fetch.PARTS).key)))


def stop_run():
  """Ends the run of this process as a signal does."""
  os.kill(os.getpid(), signal.SIGTERM)
