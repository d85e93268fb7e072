"""JSON and lines that others wrote: a text is read whole, or refused by a ValueError."""

import json
import pathlib
from typing import Any

from moe_jax import errors

LARGEST = 256 * 2**20  # bytes of a file; the largest published tokenizers have a tenth of it


def parse(text: bytes | str) -> Any:
  """The value of a JSON text.

  Raises:
    ValueError: it is no JSON, nested too deeply, or has an integer of thousands of digits.
  """
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError('it is nested too deeply') from e


def lines(path: pathlib.Path) -> list[str]:
  """The lines of a UTF-8 file without their ends and a byte order mark; the last may be empty.

  Lines end with a line feed alone: `str.splitlines` would cut at the line separators of Unicode
  too, which JSON and ordinary text may hold within a line.

  Raises:
    OSError: it cannot be read.
    UnicodeDecodeError: it is no UTF-8, a ValueError.
  """
  text = path.read_bytes().decode('utf-8-sig')
  return [line.removesuffix('\r') for line in text.split('\n')]


def read_object(path: pathlib.Path, way_out: str) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    errors.InputError: there is no such file, or it holds something else; ends with `way_out`.
  """
  try:
    if path.stat().st_size > LARGEST:
      raise ValueError(f'it has more than {LARGEST:,} bytes')
    content = parse(path.read_bytes())
    if not isinstance(content, dict):
      raise ValueError('it is not an object')
  except (OSError, ValueError) as e:
    raise errors.InputError(f'{path} must be a readable JSON object ({e}); {way_out}') from e
  return content
