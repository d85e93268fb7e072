"""The part of a study's README.md that its command writes, between two comments."""

import pathlib

from moe_jax import atomic_files, errors


def check(out: pathlib.Path, start: str, end: str):
  """Looks for the place of the tables, before anything is computed for it.

  Raises:
    errors.InputError: README.md in `out` has lost a comment.
  """
  _text(out, start, end)


def fill(out: pathlib.Path, start: str, end: str, text: str):
  """Puts `text` between the comments `start` and `end` of README.md in `out`, all else as it is.

  Without the file it is made. All is written whole or not at all.

  Raises:
    errors.InputError: the file has lost a comment.
  """
  old = _text(out, start, end)
  head, tail = old.split(start)[0], old.split(end)[1]
  atomic_files.write_text(out / 'README.md', f'{head}{start}\n\n{text}\n\n{end}{tail}')


def _text(out: pathlib.Path, start: str, end: str) -> str:
  readme = out / 'README.md'
  old = readme.read_text(encoding='utf-8') if readme.exists() else f'{start}\n{end}\n'
  errors.require(
    start in old and end in old,
    f'{readme} has no place for the tables; put the lines {start} and {end} where they belong',
  )
  return old
