"""Folders that are made here and then uploaded: exports, imports, upcycled runs.

While an upload goes on the folder holds the object `.uploading`, and nobody reads it. What one that
was cut off has left is deleted by the next.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from moe_jax import atomic_files, errors
from moe_jax.config import paths
from moe_jax.storage import bucket as bucket_lib
from moe_jax.storage import fetch, lease, urls


@contextlib.contextmanager
def folder(target: str | os.PathLike[str], flag: str) -> Iterator[pathlib.Path]:
  """The path here at which the block makes a folder; one in a bucket is uploaded at its end.

  Args:
    target: a path here, or gs://BUCKET/KEY and s3://BUCKET/KEY, below which nothing may be.
    flag: what the user calls it.

  Raises:
    errors.InputError: the place is in use, or cannot be written.
  """
  if not urls.is_remote(target):
    yield paths.local(target, flag)
    return
  url = urls.parse(target, flag)
  where, client = f'{flag}={url}', bucket_lib.Bucket(url, flag)
  marker = url.below(fetch.UPLOADING).key
  with lease.held(client, url, where) as held:
    remains = [key for key in client.find(url.key) if not key.startswith(url.below('.lease/').key)]
    errors.require(
      not remains or marker in remains,
      f'{where} must hold nothing: nothing is overwritten; choose another one',
    )
    with working_folder(url) as home:
      made = home / (url.key.rsplit('/', 1)[-1] or url.bucket)
      yield made
      held.check()
      client.write(marker, b'')
      client.delete([key for key in remains if key != marker])
      files = {
        url.below(path.relative_to(made).as_posix()).key: path
        for path in made.rglob('*')
        if path.is_file() and path.name != atomic_files.LOCK
      }
      client.put(files)
      check(client.find(url.key), files, where)
      held.check()
      client.delete([marker])


@contextlib.contextmanager
def working_folder(url: urls.Url) -> Iterator[pathlib.Path]:
  """An empty folder of this process for what is uploaded to `url`; deleted afterwards."""
  name = hashlib.sha256(str(url).encode()).hexdigest()[:16]
  home = paths.cache_root('') / 'buckets' / 'uploads' / name
  with atomic_files.lock(home):
    shutil.rmtree(home / 'files', ignore_errors=True)  # of a process that was killed
    (home / 'files').mkdir()
    try:
      yield home / 'files'
    finally:
      shutil.rmtree(home)


def check(found: Mapping[str, bucket_lib.Object], files: Mapping[str, pathlib.Path], where: str):
  """Compares what was uploaded, by size.

  Raises:
    errors.InputError: names the first difference.
  """
  for key, file in files.items():
    size = file.stat().st_size
    errors.require(
      key in found and found[key].size == size,
      f'{where}: {key} did not arrive whole ({size:,} bytes); give the same command again',
    )
