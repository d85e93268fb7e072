"""Files that are written whole or not at all, and one writer per directory."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from moe_jax import errors


def write_bytes(path: str | os.PathLike[str], data: bytes):
  """Writes beside the target, then renames over it: a kill leaves the old file or the new one."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  temporary.write_bytes(data)
  os.replace(temporary, path)


def write_text(path: str | os.PathLike[str], text: str):
  """UTF-8 `write_bytes`."""
  write_bytes(path, text.encode())


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
