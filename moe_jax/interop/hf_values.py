"""Single values of a config.json: of their type, finite, and of a size that a model can have.

Files are written by hand and by many programs; a wrong value is refused by its name here, before
anything is computed or allocated from it.
"""

from typing import Any

from moe_jax import errors, trees

LARGEST_SIZE = 2**31 - 1  # of any axis
LONGEST = 2**26  # positions; a thousand times the longest published context


def size(hf: trees.Json, name: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
  """A whole number from 1 to `most`; `default` where it is absent or null, if there is one."""
  value = _given(hf, name, default)
  errors.require(
    type(value) is int and 1 <= value <= most,
    f'config.json: {name}={_short(value)} must be a whole number from 1 to {most}; correct it',
  )
  return value


def count(hf: trees.Json, name: str) -> int:
  """A whole number; 0 where it is absent or null."""
  value = _given(hf, name, 0)
  errors.require(
    type(value) is int and 0 <= value <= LARGEST_SIZE,
    f'config.json: {name}={_short(value)} must be a whole number from 0 to {LARGEST_SIZE}, or '
    'null; correct it',
  )
  return value


def real(hf: trees.Json, name: str, low: float, high: float, default: float | None = None) -> float:
  """A number from `low` to `high`; `default` where it is absent or null, if there is one."""
  value = _given(hf, name, default)
  errors.require(
    type(value) in (int, float) and low <= value <= high,  # not so for NaN either
    f'config.json: {name}={_short(value)} must be a number from {low:g} to {high:g}; correct it',
  )
  return float(value)


def flag(hf: trees.Json, name: str, default: bool | None = None) -> bool:
  """True or false; `default` where it is absent or null, if there is one."""
  value = _given(hf, name, default)
  errors.require(
    type(value) is bool,
    f'config.json: {name}={_short(value)} must be true or false; correct it',
  )
  return value


def _given(hf: trees.Json, name: str, default: Any) -> Any:
  value = hf.get(name)
  return errors.present(
    default if value is None else value,
    f'config.json: {name} is missing, and no default is safe to take; put it in',
  )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
