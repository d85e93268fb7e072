"""Files that are written whole or not at all, and one writer per directory."""

import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import IO, Protocol, TypeVar

from absl import logging

from moe_jax import errors

LOCK = '.lock'  # in a workdir, while a run writes there
_OWNER = '.owner'  # beside it, where the file system has no locks
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_TEMPORARY = re.compile(r'\..+\.\d+\.tmp')  # of `write_bytes`


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
  with told_if_full(path, len(data)):
    try:
      temporary.write_bytes(data)
      os.replace(temporary, path)
    except OSError:
      with contextlib.suppress(OSError):  # the failure above is the one to tell of
        temporary.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def told_if_full(
  path: str | os.PathLike[str], needed: int, besides: Callable[[], str] = str
) -> Iterator[None]:
  """Turns what a write of `needed` bytes raises for a disk without room into `disk_full`.

  Args:
    path: what is written.
    needed: bytes.
    besides: what else the user should know then, '' for nothing.
  """
  try:
    yield
  except Exception as e:
    if isinstance(e, errors.InputError) or not is_disk_full(e):
      raise
    raise disk_full(path, needed, besides()) from e


@contextlib.contextmanager
def dispensable(path: str | os.PathLike[str]) -> Iterator[None]:
  """Warns where a file cannot be written that a run can do without, and goes on behind the body."""
  try:
    yield
  except (OSError, errors.InputError) as e:
    if not isinstance(e, OSError) and not isinstance(e.__cause__, OSError):
      raise
    logging.warning(f'{path} cannot be written, and the run goes on without: {e}')


def is_disk_full(error: BaseException | None) -> bool:
  """Whether an error, or what it came of, is that a disk has no room; libraries wrap it."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(os.strerror(number) in str(error) for number in _FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


def disk_full(path: str | os.PathLike[str], needed: int, besides: str = '') -> errors.InputError:
  """The error of a write of `needed` bytes for which a disk has no room; names place and sizes."""
  path = pathlib.Path(path)
  there = next(place for place in path.absolute().parents if place.exists())
  free = shutil.disk_usage(there).free
  return errors.InputError(
    f'no room on the disk for {path}: {needed:,} bytes are needed and {free:,} are free; make room '
    'and give the same command again' + (f'; {besides}' if besides else '')
  )


def write_text(path: str | os.PathLike[str], text: str):
  """UTF-8 `write_bytes`."""
  write_bytes(path, text.encode())


def free_name(numbered: Callable[[int], _AnyPath]) -> _AnyPath:
  """The first of the paths numbered(1), numbered(2), ... at which there is nothing."""
  return next(path for path in map(numbered, itertools.count(1)) if not path.exists())


@contextlib.contextmanager
def lock(workdir: pathlib.Path, enabled: bool = True) -> Iterator[None]:
  """Makes `workdir` and holds `workdir/.lock` while a run writes there.

  The system drops the lock when the process ends. Temporary files of processes that were killed are
  deleted. If an error comes before anything is written, the directory is taken away again.

  Raises:
    errors.InputError: another process holds it, or the lock belongs to another user.
  """
  if not enabled:
    yield
    return
  made = [path for path in (workdir, *workdir.parents) if not path.exists()]
  workdir.mkdir(parents=True, exist_ok=True)
  with _opened(workdir / LOCK) as handle, _held(handle, workdir):
    try:
      for pattern in ('.*.tmp', '*/.*.tmp'):
        for path in workdir.glob(pattern):
          if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
      yield
    except BaseException:
      with contextlib.suppress(OSError):  # checkpoints, or a parent, holds something
        if made and {path.name for path in workdir.iterdir()} <= {LOCK, _OWNER, 'checkpoints'}:
          if (workdir / 'checkpoints').exists():
            (workdir / 'checkpoints').rmdir()
          for name in (LOCK, _OWNER):
            (workdir / name).unlink(missing_ok=True)
          for path in made:
            path.rmdir()
      raise


def _opened(path: pathlib.Path) -> IO[str]:
  try:
    return path.open('w')
  except OSError as e:
    raise errors.InputError(
      f'{path} cannot be written: {e.strerror or e}; a run left it behind, perhaps one of another '
      'user: delete it if none is going on there, or use another directory'
    ) from e


@contextlib.contextmanager
def _held(handle: IO[str], workdir: pathlib.Path) -> Iterator[None]:
  """Locks an open file, or, on a file system that cannot, a file with the name of its owner."""
  busy = errors.InputError(
    f'--workdir={workdir} is being written by another process; wait for it or stop it, or use '
    'another --workdir'
  )
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    raise busy from e
  except OSError as e:
    if e.errno not in _NO_LOCKS:
      raise
    logging.warning(f'{workdir} cannot be locked ({e.strerror}): a file names its owner instead.')
    with _owned(workdir / _OWNER):
      yield
    return
  yield


@contextlib.contextmanager
def _owned(path: pathlib.Path) -> Iterator[None]:
  """Holds a file that only one process can make, with its host and number in it.

  One that a dead process of this host left behind is replaced.

  Raises:
    errors.InputError: another process made it, and is alive or of another host.
  """
  me = f'{socket.gethostname()} {os.getpid()}'
  if path.exists():
    owner = path.read_text(encoding='utf-8')
    errors.require(
      _is_dead(owner),
      f'{path} says that process {owner!r} (host, number) writes here; wait for it or stop it, or '
      'delete that file if it is no more',
    )
    path.unlink(missing_ok=True)
  try:
    with path.open('x', encoding='utf-8') as handle:
      handle.write(me)
  except FileExistsError as e:
    raise errors.InputError(
      f'{path} was just made by another process; use another --workdir'
    ) from e
  try:
    yield
  finally:
    path.unlink(missing_ok=True)


def _is_dead(owner: str) -> bool:
  """Whether process 'host number' is of this host and has ended; this one has not begun yet."""
  host, _, number = owner.rpartition(' ')
  if host != socket.gethostname() or not number.isdecimal():
    return False
  return int(number) == os.getpid() or not is_alive(int(number))


def is_alive(process: int) -> bool:
  """Whether a process of this machine runs, of whatever user."""
  try:
    with contextlib.suppress(PermissionError):  # it is another user's
      os.kill(process, 0)
  except ProcessLookupError:
    return False
  return True
