"""Files that are written whole or not at all, and one writer per directory."""

import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from moe_jax import errors

_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Path(Protocol):
  def exists(self) -> bool: ...


_AnyPath = TypeVar('_AnyPath', bound=_Path)


def write_bytes(path: str | os.PathLike[str], data: bytes):
  """Writes atomically (temporary file, then rename): a kill leaves the old file or the new one.

  Raises:
    errors.InputError: the disk is full.
    OSError: the file cannot be written for another reason.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except OSError as e:
    with contextlib.suppress(OSError):  # the failure above is the one to tell of
      temporary.unlink(missing_ok=True)
    if e.errno in _FULL:
      raise disk_full(path, len(data)) from e
    raise


def disk_full(path: str | os.PathLike[str], needed: int) -> errors.InputError:
  """The error of a write of `needed` bytes for which a disk has no room; names place and sizes."""
  path = pathlib.Path(path)
  free = shutil.disk_usage(path.parent).free
  return errors.InputError(
    f'no room on the disk for {path}: {needed:,} bytes are needed and {free:,} are free; make room '
    'and give the same command again'
  )


def write_text(path: str | os.PathLike[str], text: str):
  """UTF-8 `write_bytes`."""
  write_bytes(path, text.encode())


def free_name(numbered: Callable[[int], _AnyPath]) -> _AnyPath:
  """The first of the paths numbered(1), numbered(2), ... at which there is nothing."""
  return next(path for path in map(numbered, itertools.count(1)) if not path.exists())


@contextlib.contextmanager
def lock(workdir: pathlib.Path, enabled: bool = True) -> Iterator[None]:
  """Holds `workdir/.lock` while a run writes there; the system drops it when the process ends.

  Raises:
    errors.InputError: another process holds it.
  """
  if not enabled:
    yield
    return
  with (workdir / '.lock').open('w') as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise errors.InputError(
        f'--workdir={workdir} is being written by another process; wait for it or stop it, or use '
        'another --workdir'
      ) from e
    yield
