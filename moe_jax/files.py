"""Files that are written whole or not at all."""

import os
import pathlib


def write_bytes(path: str | os.PathLike[str], data: bytes):
  """Writes beside the target, then renames over it: a kill leaves the old file or the new one."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  temporary.write_bytes(data)
  os.replace(temporary, path)


def write_text(path: str | os.PathLike[str], text: str):
  """UTF-8 `write_bytes`."""
  write_bytes(path, text.encode())
