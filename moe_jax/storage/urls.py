"""Addresses of objects, and the names of their copies on this machine."""

import os
import re
from typing import NamedTuple

from moe_jax import errors

SCHEMES = ('gs', 's3')
# `pathlib` makes gs:/bucket of gs://bucket.
_URL = re.compile(rf'({"|".join(SCHEMES)}):/+([^/]*)/*(.*)', re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{1,221}')


class Url(NamedTuple):
  """An object, or all those whose keys begin with `key` and a slash; '' is the whole bucket."""

  scheme: str
  bucket: str
  key: str

  def __str__(self) -> str:
    return f'{self.scheme}://{self.bucket}/{self.key}'.rstrip('/')

  @property
  def path(self) -> str:
    """Bucket and key, as fsspec wants them."""
    return f'{self.bucket}/{self.key}'.rstrip('/')

  def below(self, relative: str) -> 'Url':
    """The address of an object below this one."""
    return self._replace(key=f'{self.key}/{relative}'.lstrip('/'))


def is_remote(text: str | os.PathLike[str]) -> bool:
  """Whether an address is one of object storage that is read and written here."""
  return _URL.fullmatch(os.fspath(text)) is not None


def parse(text: str | os.PathLike[str], name: str = '') -> Url:
  """The address that a text for which `is_remote` holds means; `name` is its flag or field.

  Raises:
    errors.InputError: there is no such bucket name, or the key cannot be a path here.
  """
  text = os.fspath(text)
  where = f'{name}={text}' if name else text
  match = _URL.fullmatch(text)
  if match is None or not _BUCKET.fullmatch(match[2]):
    raise errors.InputError(f'{where!a} must be gs://BUCKET/KEY or s3://BUCKET/KEY; correct it')
  url = Url(match[1].lower(), match[2], match[3].rstrip('/'))
  return url._replace(key=checked_key(url.key, where))


def checked_key(key: str, where: str) -> str:
  """A key that can be the path of a file below a folder on this machine.

  Raises:
    errors.InputError: it has empty or dotted parts, or a zero byte.
  """
  bad = bool(key) and any(part in ('', '.', '..') for part in key.split('/'))
  errors.require(
    not bad and '\0' not in key,
    f'{where!a}: the key {key!a} has an empty part, "." or "..", or a zero byte, and can have no '
    'copy on this machine; rename the object',
  )
  return key
