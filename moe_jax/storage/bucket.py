"""What is done with objects, through fsspec (gcsfs, s3fs); every failure is one line.

gcsfs and s3fs try again by themselves when the network fails for a moment.
"""

import contextlib
import glob
import importlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import atomic_files, errors
from moe_jax.storage import urls

_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}
_BATCH = 32  # files in flight
_LOGIN = {
  'gs': 'gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS',
  's3': 'aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY',
}


class Object(NamedTuple):
  """What a listing says of an object; `version` changes whenever its bytes may have."""

  size: int
  version: str


class Bucket:
  """The objects of the bucket of `url`.

  Args:
    url: names the bucket; only messages hold its key.
    name: of the flag or field that holds the address, for messages.
  """

  def __init__(self, url: urls.Url, name: str = ''):
    self._url, self._where = url, f'{name}={url}' if name else str(url)
    with self._told():
      self._fs = _filesystem(url.scheme)

  def find(self, key: str, *, magic: bool = False) -> dict[str, Object]:
    """Key -> object: that of a key, those below it or, with `magic`, those that match it as a glob.

    The key itself comes first: a name with brackets that exists is no pattern.
    """
    path = self._url._replace(key=key).path
    with self._told():
      self._fs.invalidate_cache()
      try:
        found = self._fs.find(path, detail=True)
        if not found and magic and glob.has_magic(key):
          found = self._fs.glob(path, detail=True)
      except FileNotFoundError:
        found = {}
    return {key: one for key, one in map(self._object, found.items()) if key}

  def _object(self, item: tuple[str, Mapping[str, Any]]) -> tuple[str, Object]:
    """(key, object) of an entry of a listing; key '' for what only looks like a directory."""
    path, info = item
    key = path.partition('/')[2]
    if info['type'] != 'file' or not key or key.endswith('/'):
      return '', Object(0, '')
    urls.checked_key(key, self._where)
    version = info.get('generation') or info.get('ETag') or info.get('etag')
    return key, Object(int(info['size']), str(version))

  def get(self, files: Mapping[str, pathlib.Path]):
    """Downloads objects: key -> file."""
    with self._told():
      for batch in _batches(list(files.items())):
        paths = [self._url._replace(key=key).path for key, _ in batch]
        self._fs.get(paths, [str(file) for _, file in batch])

  def put(self, files: Mapping[str, pathlib.Path]):
    """Uploads files: key -> file."""
    with self._told():
      for batch in _batches(list(files.items())):
        paths = [self._url._replace(key=key).path for key, _ in batch]
        self._fs.put([str(file) for _, file in batch], paths)

  def read(self, key: str) -> bytes | None:
    """The bytes of an object; None if there is none."""
    with self._told():
      try:
        return self._fs.cat_file(self._url._replace(key=key).path)
      except FileNotFoundError:
        return None

  def write(self, key: str, data: bytes):
    """Makes or replaces an object."""
    with self._told():
      self._fs.pipe_file(self._url._replace(key=key).path, data)

  def create(self, key: str, data: bytes) -> bool:
    """Makes an object unless there is one (ifGenerationMatch=0, If-None-Match); whether it did."""
    with self._told():
      try:
        self._fs.pipe_file(self._url._replace(key=key).path, data, mode='create')
      except Exception as e:
        if _exists_already(e):
          return False
        raise
    return True

  def delete(self, keys: Sequence[str]):
    """Deletes objects; one that is gone already is no error."""
    with self._told():
      for key in keys:
        with contextlib.suppress(FileNotFoundError):  # what was asked for
          self._fs.rm_file(self._url._replace(key=key).path)

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """Turns what the libraries raise into one line."""
    try:
      yield
    except errors.InputError:
      raise
    except Exception as e:
      if atomic_files.is_disk_full(e):
        raise errors.InputError(
          f'{self._where}: no room on the disk for its copy; make room, or set MOE_JAX_CACHE'
        ) from e
      raise errors.InputError(f'{self._where}: {_problem(e, self._url)}') from e


def _filesystem(scheme: str) -> Any:
  """The fsspec file system of a scheme."""
  package = _PACKAGES[scheme]
  try:
    importlib.import_module(package)
    fsspec = importlib.import_module('fsspec')
  except ImportError as e:
    raise errors.InputError(
      f'{scheme}:// needs the package {package}, which is not installed ({e}); '
      'pip install moe_jax[storage]'
    ) from e
  return fsspec.filesystem(scheme)


def _batches(items: Sequence[Any]) -> list[Any]:
  return [items[i : i + _BATCH] for i in range(0, len(items), _BATCH)]


def _exists_already(error: Exception) -> bool:
  text = f'{getattr(error, "code", "")} {error}'
  return isinstance(error, FileExistsError) or any(
    word in text for word in ('412', 'conditionNotMet', 'PreconditionFailed', 'pre-conditions')
  )


def _problem(error: Exception, url: urls.Url) -> str:
  """What went wrong and what helps, of an error of gcsfs, s3fs or below."""
  name, text = type(error).__name__, ' '.join(str(error).split())[:200]
  code = str(getattr(error, 'code', getattr(error, 'status', '')))
  words = f'{name} {text}'.lower()
  if isinstance(error, FileNotFoundError) or code == '404' or 'nosuchbucket' in words:
    return f'there is no bucket {url.bucket!r}, or no such object ({text}); correct the address'
  if 'credential' in words or 'anonymous' in words or code == '401' or 'refresherror' in words:
    return f'no valid credentials were found ({name}: {text}); {_LOGIN[url.scheme]} gives them'
  if isinstance(error, PermissionError) or code == '403' or 'forbidden' in words:
    return (
      f'permission denied ({text}); let this account list, read, write and delete objects of '
      f'{url.bucket!r}, or log in as another one ({_LOGIN[url.scheme]})'
    )
  return (
    f'{url.scheme}:// cannot be reached or broke off ({name}: {text}); check the network and give '
    'the same command again'
  )
