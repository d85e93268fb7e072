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
      f'{where} is no path on this machine: {kind}:// is not read and not written; mount it or '
      'copy it, and give the path of the folder here',
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
