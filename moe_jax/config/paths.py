"""What a path means that somebody wrote into a flag, a config or a call."""

import os
import pathlib
import re
import urllib.parse

from moe_jax import errors

# `pathlib` makes gs:/bucket of gs://bucket. One letter would be a drive.
_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/')


def local(text: str | os.PathLike[str], name: str = '') -> pathlib.Path:
  """The path on this machine that `text` means: `~` is a home, `file:///a` is /a.

  Args:
    text: as it was written.
    name: of the flag or the field, for messages.

  Raises:
    errors.InputError: it lies in object storage or the like, or in the home of an unknown user.
  """
  text = os.fspath(text)
  where = f'{name}={text}' if name else text
  errors.require('\0' not in text, f'{where!a} must not hold a zero byte; correct it')
  scheme = _SCHEME.match(text)
  if scheme:
    kind, url = scheme[1].lower(), urllib.parse.urlsplit(text)
    errors.require(
      kind == 'file',
      f'{where} must be a path on this machine: {kind}:// is not read and not written here '
      '(docs/topics/storage.md says where gs:// and s3:// are); mount it or copy it, and give the '
      'path of the folder here',
    )
    errors.require(
      url.netloc in ('', 'localhost'),
      f'{where} must be file:///PATH with three slashes, which {url.netloc!r} follows; correct it',
    )
    return pathlib.Path(urllib.parse.unquote(url.path))
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as e:
    raise errors.InputError(
      f'{where} begins with a home that is not known ({e}); write the path out'
    ) from e


def cache_root(cache_dir: str) -> pathlib.Path:
  """Resolves `config.data.cache_dir`; '' is $MOE_JAX_CACHE, or ~/.cache/moe_jax without it.

  Raises:
    errors.InputError: it is no path here, or there is no home (as in some containers).
  """
  if cache_dir:
    return local(cache_dir, 'config.data.cache_dir')
  if chosen := os.environ.get('MOE_JAX_CACHE'):
    return local(chosen, 'MOE_JAX_CACHE')
  try:
    return pathlib.Path('~/.cache/moe_jax').expanduser()
  except RuntimeError as e:
    raise errors.InputError(
      "config.data.cache_dir='' means ~/.cache/moe_jax, and this user has no home directory; set "
      'config.data.cache_dir, or the environment variable MOE_JAX_CACHE or HOME, to a directory'
    ) from e
