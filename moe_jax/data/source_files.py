"""The files that a path of a source names, and how they are opened.

A path is a list of files, directories and globs with commas between them. What exists under the
whole of a name is meant by it, commas, brackets and all; a directory is the files below it that a
source reads. Files ending in .gz and .zst are decompressed as they are read.
"""

import gzip
import importlib
import os
import pathlib
from collections.abc import Callable, Sequence
from glob import escape, glob, has_magic
from typing import Any

from moe_jax import errors
from moe_jax.storage import fetch

_PACKED = ('.gz', '.zst')


def named(
  path: str, where: str, field: str, suffixes: Sequence[str]
) -> list[tuple[str, pathlib.Path]]:
  """The files that a path names, each with its name below the root of its glob or directory.

  Args:
    path: as in the config.
    where: how messages begin.
    field: the path's name in the config, for messages.
    suffixes: of the files that are read in a directory; () for all of them.

  Raises:
    errors.InputError: nothing is there.
  """
  files: dict[pathlib.Path, str] = {}
  for one in split(path):
    place = fetch.local(one, field)
    if os.path.isfile(place):
      files[place] = place.name
      continue
    if os.path.isdir(place):
      root, found = place, _below(place, suffixes)
      problem = f'the directory {one!r} must hold {" or ".join(suffixes) or "visible"} files'
    else:
      root, found = _matches(place)
      problem = f'{one!r} does not exist; name files, or a glob such as {str(place.parent / "*")!r}'
      if has_magic(one):
        problem = f'the glob {one!r} must match a file, and it matches none; correct it'
    errors.require(bool(found), f'{where}: {problem}')
    files.update({match: match.relative_to(root).as_posix() for match in found})
  # One file under two spellings is one file, or it could be in both splits.
  distinct: dict[pathlib.Path, tuple[str, pathlib.Path]] = {}
  for place, name in files.items():
    distinct.setdefault(place.resolve(), (name, place))
  return list(distinct.values())


def split(path: str) -> list[str]:
  """The names in a path: between commas, but for commas of something that exists as a whole."""
  parts, found = path.split(','), []
  while parts:
    whole = (n for n in range(len(parts), 1, -1) if exists(','.join(parts[:n]).strip()))
    count = next(whole, 1)
    found.append(','.join(parts[:count]).strip())
    parts = parts[count:]
  return [name for name in found if name]


def exists(name: str) -> bool:
  """Whether a name, or a glob, is of something that is there."""
  place = pathlib.Path(os.path.expanduser(name))
  return os.path.exists(place) or (has_magic(name) and bool(_matches(place)[1]))


def _matches(place: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The part of a pattern before its magic, and the files that match; what exists is no magic."""
  parts = place.parts
  magic = (i for i, part in enumerate(parts) if has_magic(part))
  first = next((i for i in magic if not os.path.exists(pathlib.Path(*parts[: i + 1]))), None)
  if first is None:
    return place.parent, []
  root = pathlib.Path(*parts[:first])
  pattern = os.path.join(escape(str(root)), *parts[first:])
  return root, [p for p in sorted(map(pathlib.Path, glob(pattern, recursive=True))) if p.is_file()]


def _below(root: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
  """The files below a directory with these suffixes, packed or not; hidden ones are left out."""
  found = []
  for place in sorted(root.rglob('*')):
    hidden = any(part.startswith('.') for part in place.relative_to(root).parts)
    ends = tuple(s + packed for s in suffixes for packed in ('', *_PACKED))
    if place.is_file() and not hidden and (not suffixes or place.name.endswith(ends)):
      found.append(place)
  return found


def stem(file: pathlib.Path) -> str:
  """A file's name without its suffix, packed or not: 'a' of a.jsonl.gz."""
  return (file.with_suffix('') if file.suffix in _PACKED else file).stem


def opened(file: pathlib.Path, optional: Callable[[str, str], Any]) -> Any:
  """Opens a file to read bytes, decompressed if its name ends in .gz or .zst.

  Args:
    file: the file.
    optional: (module, package) -> the module of a package that may not be there.
  """
  if file.suffix == '.gz':
    return gzip.open(file, 'rb')
  if file.suffix == '.zst':
    try:
      library = importlib.import_module('compression.zstd')  # of newer Pythons
    except ImportError:
      library = optional('zstandard', 'zstandard')
    return library.open(file, 'rb')
  return file.open('rb')


def stamp(directory: str) -> list[str]:
  """Names, sizes and times of the files of a local data set; [] if there is no such place."""
  root = pathlib.Path(directory)
  files = [root] if root.is_file() else [p for p in sorted(root.rglob('*')) if p.is_file()]
  states = ((p, p.stat()) for p in files if root.exists())
  return [f'{p.relative_to(root)} {s.st_size} {s.st_mtime_ns}' for p, s in states]
