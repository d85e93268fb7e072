"""Copies on this machine of what is read from object storage: data, tokenizers, checkpoints, runs.

`CACHE/buckets/objects/SCHEME/BUCKET/KEY` is the copy of an object and `CACHE/buckets/versions/...`
holds its size and its generation (gs) or etag (s3). The bucket is listed at every call, and what is
new or has changed is downloaded beside its place, compared by size and renamed. What has gone is
deleted, so that a directory here holds what the prefix there does.

A checkpoint step of which `_CHECKPOINT_METADATA` is missing was not uploaded to its end, and is
never read: it is the last object of a step to be written, and the first to be deleted. A folder
with the object `.uploading` is unfinished as a whole.
"""

import contextlib
import glob
import os
import pathlib
import re
import uuid
from collections.abc import Collection, Iterable, Mapping

from moe_jax import atomic_files, errors
from moe_jax.config import paths
from moe_jax.storage import bucket as bucket_lib
from moe_jax.storage import urls

UPLOADING, LEASE, SESSION, PARTS = '.uploading', '.lease', '.session', '.parts'
LAST = '_CHECKPOINT_METADATA'  # of the objects of a step
_STEP = re.compile(r'((?:.*/)?checkpoints/([^/]+))/.+', re.DOTALL)
_STEP_NAME = re.compile(r'\d+(\.(damaged|superseded)-\d+)?')
_DOWNLOAD = 64  # files that are downloaded before they are renamed


def local(text: str | os.PathLike[str], name: str = '') -> pathlib.Path:
  """The path on this machine of what is to be read: that of `paths.local`, or of a fresh copy.

  Args:
    text: a path, file:///PATH, or gs://BUCKET/KEY and s3://BUCKET/KEY, where KEY is an object, a
      prefix or a glob (whose copy is a glob too).
    name: of the flag or field, for messages.

  Raises:
    errors.InputError: nothing is there, or it cannot be read.
  """
  if not urls.is_remote(text):
    return paths.local(text, name)
  url = urls.parse(text, name)
  client = bucket_lib.Bucket(url, name)
  where = f'{name}={url}' if name else str(url)
  found = finished(client.find(url.key, magic=True), where)
  errors.require(
    bool(found),
    f'{where}: there is no bucket {url.bucket!r}, or no finished object of this name, below it or '
    'matching it; correct the address',
  )
  root = paths.cache_root('') / 'buckets'
  objects = root / 'objects' / url.scheme / url.bucket
  download(client, found, objects, root / 'versions' / url.scheme / url.bucket, where)
  _forget(objects, url.key, set(found))
  return objects / url.key


def step_of(key: str) -> tuple[str, str]:
  """(prefix of the checkpoint step of an object, name of the step); empty for others."""
  match = _STEP.fullmatch(key)
  return (match[1], match[2]) if match else ('', '')


def is_step_name(name: str) -> bool:
  """Whether a folder below `checkpoints/` is a step that is written, or moved aside."""
  return _STEP_NAME.fullmatch(name) is not None


def finished(found: Mapping[str, bucket_lib.Object], where: str) -> dict[str, bucket_lib.Object]:
  """The objects that may be read: no step that is not complete, and nothing that guards a run.

  Raises:
    errors.InputError: the folder is being uploaded.
  """
  names = {key: key.rsplit('/', 1)[-1] for key in found}
  unfinished = next((key for key, name in names.items() if name == UPLOADING), None)
  errors.require(
    unfinished is None,
    f'{where} is being uploaded, or its upload was cut off ({unfinished} is there); wait for it, '
    'or give the command that writes it again',
  )
  return {
    key: one
    for key, one in found.items()
    if names[key] != SESSION
    and not any(f'/{name}/' in f'/{key}' for name in (LEASE, PARTS))
    and (not step_of(key)[0] or f'{step_of(key)[0]}/{LAST}' in found)
  }


def download(
  client: bucket_lib.Bucket,
  found: Mapping[str, bucket_lib.Object],
  objects: pathlib.Path,
  versions: pathlib.Path,
  where: str,
):
  """Brings the copies below `objects` up to date; each is whole or absent at any moment.

  Raises:
    errors.InputError: an object cannot be read, or was changed meanwhile.
  """
  due = [key for key, one in found.items() if not _is_fresh(objects / key, versions / key, one)]
  for i in range(0, len(due), _DOWNLOAD):
    parts = {key: _beside(objects / key) for key in due[i : i + _DOWNLOAD]}
    try:
      for key in parts:
        for file in (objects / key, versions / key):
          file.parent.mkdir(parents=True, exist_ok=True)
      client.get(parts)
      for key, part in parts.items():
        size = part.stat().st_size if part.exists() else -1
        errors.require(
          size == found[key].size,
          f'{where}: {size:,} bytes came of {key}, which has {found[key].size:,}: it was changed '
          'while it was read; give the same command again',
        )
        (versions / key).unlink(missing_ok=True)
        os.replace(part, objects / key)
        atomic_files.write_text(versions / key, _stamp(found[key]))
    except OSError as e:
      raise errors.InputError(
        f'{where}: no copy can be written to {objects} ({e.strerror or e}); set MOE_JAX_CACHE to a '
        'directory with room'
      ) from e
    finally:
      for part in parts.values():
        with contextlib.suppress(OSError):  # renamed, or its folder was never made
          part.unlink(missing_ok=True)


def _beside(file: pathlib.Path) -> pathlib.Path:
  return file.with_name(f'.{file.name[:100]}.{uuid.uuid4().hex}')


def _stamp(one: bucket_lib.Object) -> str:
  return f'{one.size} {one.version}'


def _is_fresh(file: pathlib.Path, version: pathlib.Path, one: bucket_lib.Object) -> bool:
  try:
    known = version.read_text(encoding='utf-8')
    return known == _stamp(one) and file.stat().st_size == one.size
  except OSError:
    return False


def _forget(objects: pathlib.Path, key: str, wanted: Collection[str]):
  """Deletes copies of objects that are no more: below a prefix, or matching a glob."""
  place = objects / key
  copies: Iterable[pathlib.Path] = place.rglob('*') if place.is_dir() else ()
  if glob.has_magic(key) and not place.exists():
    pattern = os.path.join(glob.escape(str(objects)), key)
    copies = map(pathlib.Path, glob.glob(pattern, recursive=True))
  for copy in sorted(copies, reverse=True):  # what is in a folder before the folder
    if copy.is_dir():
      with contextlib.suppress(OSError):  # it holds something
        copy.rmdir()
    elif copy.relative_to(objects).as_posix() not in wanted and not copy.name.startswith('.'):
      copy.unlink(missing_ok=True)
