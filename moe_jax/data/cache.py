"""Directories of derived data, named by a hash of what they derive from.

A directory is built under a temporary name beside its final one and then renamed, so that whatever
stands under the final name is whole. Two processes that build the same thing both succeed: the
second finds the first one's result, which is equal by its name, and drops its own.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable

from moe_jax import errors


def get_or_build(
  target: pathlib.Path,
  build: Callable[[pathlib.Path], None],
  is_whole: Callable[[pathlib.Path], bool],
) -> pathlib.Path:
  """Returns `target`, filled by `build(directory)` unless `is_whole(target)` already holds.

  Raises:
    errors.InputError: the cache cannot be written.
  """
  if is_whole(target):
    return target
  try:
    _clear(target)
    temporary, handle = _make(target)
  except OSError as e:
    raise _unwritable(target, e) from e
  try:
    build(temporary)
    _publish(temporary, target, is_whole)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)  # already renamed away if all went well
    os.close(handle)
  return target


def _make(target: pathlib.Path) -> tuple[pathlib.Path, int]:
  """A new directory beside `target` and the handle that holds its lock, where there are locks."""
  while True:
    temporary = target.parent / f'.{target.name}.{uuid.uuid4().hex}'
    temporary.mkdir(parents=True)
    try:
      handle = os.open(temporary, os.O_RDONLY)
    except FileNotFoundError:  # another process, which also begins to build, has cleared it already
      continue
    with contextlib.suppress(OSError):  # a file system without locks: nobody clears it either
      fcntl.flock(handle, fcntl.LOCK_EX)
    if temporary.exists():
      return temporary, handle
    os.close(handle)  # it was cleared between being opened and being locked


def _clear(target: pathlib.Path):
  """Deletes what builders of `target` that were killed have left: nobody holds its lock."""
  for left in target.parent.glob(f'.{target.name}.*'):
    try:
      handle = os.open(left, os.O_RDONLY)
    except OSError:  # just published or deleted, or of another user
      continue
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its builder is at work, or the file system has no locks
      continue
    else:
      shutil.rmtree(left, ignore_errors=True)
    finally:
      os.close(handle)


def _publish(
  temporary: pathlib.Path, target: pathlib.Path, is_whole: Callable[[pathlib.Path], bool]
):
  failure = None
  for _ in range(3):
    try:
      os.rename(temporary, target)
      return
    except OSError as e:
      failure = e
    if is_whole(target):  # another process was first
      return
    shutil.rmtree(target, ignore_errors=True)  # damaged, for example by a full disk
  raise _unwritable(target, failure)


def _unwritable(target: pathlib.Path, error: OSError | None) -> errors.InputError:
  return errors.InputError(
    f'config.data.cache_dir: cannot write {str(target)!r} ({error}); it must be a writable '
    'directory: set config.data.cache_dir or the environment variable MOE_JAX_CACHE to one'
  )
