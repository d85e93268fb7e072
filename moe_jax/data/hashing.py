"""Hashes that agree across processes, machines and Python versions, unlike the built-in `hash`.

Everything that decides which split a document falls into, which text trains the tokenizer, or which
cached file is the right one, goes through here. Parts are framed by their length, so ('ab', 'c') is
not ('a', 'bc').
"""

import hashlib
from typing import Any


def new(*parts: str | bytes | int | float, digest_size: int = 16) -> Any:
  """Returns a BLAKE2b hasher that has already taken in `parts`; `update` takes in more."""
  hasher = hashlib.blake2b(digest_size=digest_size)
  update(hasher, *parts)
  return hasher


def update(hasher: Any, *parts: str | bytes | int | float):
  """Takes more parts into a hasher made by `new`."""
  for part in parts:
    # File names that are no UTF-8 reach Python as surrogate escapes; they hash like any other name.
    data = part if isinstance(part, bytes) else str(part).encode('utf-8', 'surrogateescape')
    hasher.update(len(data).to_bytes(8, 'little'))
    hasher.update(data)


def hexdigest(*parts: str | bytes | int | float) -> str:
  """Names content: 32 hexadecimal digits."""
  return new(*parts).hexdigest()


def integer(*parts: str | bytes | int | float) -> int:
  """A uniform integer in [0, 2^64)."""
  return int.from_bytes(new(*parts, digest_size=8).digest(), 'little')


def uniform(*parts: str | bytes | int | float) -> float:
  """A uniform number in [0, 1); 53 bits, so that it never rounds up to 1."""
  return (integer(*parts) >> 11) / 2**53
