"""What the processes of one run do together, once JAX is started.

Every process runs the same program, and whatever moves data between devices must be called by all
of them in the same order. So no function here may stand behind `if is_first()`. With one process
each of them costs nothing.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moe_jax import errors, trees

_TEXT_BYTES = 2000
_SHARED_SECONDS = 10.0  # network file systems may show a new file late


def is_first() -> bool:
  """Whether this process is the one that writes logs and says things."""
  return jax.process_index() == 0


def wait_for_all():
  """A barrier: returns once every process has called it."""
  if jax.process_count() > 1:
    multihost_utils.process_allgather(np.zeros((), np.uint8))


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Bad input that one process finds inside stops all of them; inside, nothing may be collective.

  Raises:
    errors.InputError: one process raised it; the others name that process.
  """
  problem = ''
  try:
    yield
  except errors.InputError as e:
    if jax.process_count() == 1:
      raise
    problem = str(e) or 'bad input'
  if jax.process_count() == 1:
    return
  problems = texts(problem)
  if not any(problems):
    return
  number = next(i for i, text in enumerate(problems) if text)
  prefix = '' if all(text == problems[number] for text in problems) else f'process {number}: '
  raise errors.InputError(problem or prefix + problems[number])


def require_same(values: trees.Json):
  """Makes sure that every process holds the same values, for example of its own copy of the text.

  Args:
    values: what JSON can hold, by a name for people.

  Raises:
    errors.InputError: on all processes alike; names the value and the processes.
  """
  if jax.process_count() == 1:
    return

  def text(value):
    return json.dumps(value, sort_keys=True).encode()

  digests = np.stack(
    [np.frombuffer(hashlib.sha256(text(v)).digest(), np.uint8) for v in values.values()]
  )
  gathered = multihost_utils.process_allgather(digests)  # [processes, values, 32]
  for i, name in enumerate(values):
    others = np.flatnonzero((gathered[:, i] != gathered[0, i]).any(axis=-1)).tolist()
    if others:
      raise errors.InputError(
        f'{name} is not the same on process 0 and on process {", ".join(map(str, others[:20]))}; '
        'all processes must read the same files with the same software'
      )


def require_shared(directory: pathlib.Path):
  """Makes sure that all processes see one and the same directory.

  Raises:
    errors.InputError: on all processes; names those that see another one.
  """
  if jax.process_count() == 1:
    return
  names = texts(secrets.token_hex(8) if is_first() else '')
  probe = directory / f'.seen-{names[0]}'
  if is_first():
    probe.touch()
  wait_for_all()
  deadline = time.monotonic() + _SHARED_SECONDS
  while not probe.exists() and time.monotonic() < deadline:
    os.listdir(directory)  # makes a network file system look again
    time.sleep(0.2)
  seen = multihost_utils.process_allgather(np.array(probe.exists()))
  if is_first():
    probe.unlink()
  blind = np.flatnonzero(~seen).tolist()
  if blind:
    raise errors.InputError(
      f'--workdir={directory} on process {", ".join(map(str, blind[:20]))} is not the directory '
      'that process 0 has under this name; put it on a file system that all machines share'
    )


def fetch(tree: trees.Tree) -> trees.Tree:
  """Arrays of any sharding as whole numpy arrays, on every process."""
  return jax.tree.map(_fetch, tree)


def _fetch(x: Any) -> np.ndarray:
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


class StopAgreement:
  """A signal that one process was sent becomes the decision of all, at the same step.

  After every step each device contributes the number of the signal that its process was sent, 0 for
  none, and the largest is read `lag` steps later. That costs one all-reduce of a number per step
  and no waiting, works for every signal, and needs only what training needs anyway. JAX's
  preemption service would also find a common step, but it takes the handler of SIGTERM for itself.

  Args:
    mesh: devices of all processes.
    lag: steps that the loop may run ahead of its devices, `loop.MAX_IN_FLIGHT`: the flag of a step
      so long ago has arrived, and nobody waits for it.
  """

  def __init__(self, mesh: jax.sharding.Mesh, lag: int):
    self._lag = lag
    self._sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    self._size = mesh.size
    self._largest = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))
    self._flags: dict[int, jax.Array] = {}
    self._sent: collections.deque[jax.Array] = collections.deque()

  def after_step(self, name: str) -> str:
    """Call once per step with the name of the signal that this process was sent, '' for none.

    Returns:
      '', or the name of the signal for which all processes stop after this very step.
    """
    if jax.process_count() == 1:
      return name
    number = signal.Signals[name].value if name else 0
    if number not in self._flags:
      self._flags[number] = jax.make_array_from_callback(
        (self._size,), self._sharding, lambda index: np.full(1, number, np.int32)
      )
    self._sent.append(self._largest(self._flags[number]))
    if len(self._sent) <= self._lag:
      return ''
    agreed = int(self._sent.popleft())
    return signal.Signals(agreed).name if agreed else ''


def texts(text: str) -> list[str]:
  """The texts of all processes, by process; up to 2000 bytes of each."""
  line = np.zeros(_TEXT_BYTES, np.uint8)
  encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
  line[: len(encoded)] = encoded
  gathered = multihost_utils.process_allgather(line)
  return [bytes(row[row > 0]).decode(errors='ignore') for row in gathered]
