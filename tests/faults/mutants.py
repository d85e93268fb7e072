"""Mutants of files, drawn from a seed: JSON values, raw bytes, and whole small formats."""

import copy
import io
import json
import random
import zipfile
from typing import Any

import numpy as np

DEEP = 3_000
VALUES = [
  *(None, True, False, 0, 1, -1, 3, 0.5, -0.5, 1e308, 10**9, 10**18, 10**29, 2**63),
  *('', 'a', 'abc', '10000', 'x' * 1000, [], {}, [[]], [1, 2], {'a': 1}, 'NaN', '\u0000', '\n'),
]
# Not what json.dumps writes.
TEXTS = ['NaN', 'Infinity', '-Infinity', '1e999', '9' * 5000]
TEXTS += ['[' * DEEP + ']' * DEEP, '{"a":' * DEEP]


def json_value(rng: random.Random, value: Any) -> Any:
  """A copy of a JSON value with one to three of its parts replaced, removed or repeated."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    places = list(_places(value))
    if not places:
      return rng.choice(VALUES)
    holder, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0:
      del holder[key]
    elif how == 1 and isinstance(holder, dict):
      holder[f'{key}x'] = holder.pop(key)
    elif how == 2 and isinstance(holder[key], (int, float)):
      holder[key] *= rng.choice((-1, 2, 10**6, 0.5))
    else:
      holder[key] = copy.deepcopy(rng.choice(VALUES))
  return value


def json_text(rng: random.Random, value: Any) -> bytes:
  """The text of a mutated value; sometimes no JSON at all."""
  text = json.dumps(json_value(rng, value))
  how = rng.randrange(8)
  if how == 0:
    return raw(rng, text.encode())
  if how == 1:
    spots = [i for i, c in enumerate(text) if c == ':'] or [0]
    at = rng.choice(spots) + 1
    end = next((i for i in range(at, len(text)) if text[i] in ',}'), len(text))
    return (text[:at] + rng.choice(TEXTS) + text[end:]).encode()
  return text.encode()


def raw(rng: random.Random, data: bytes) -> bytes:
  """Bytes flipped, cut off, left out, repeated or put in."""
  data, at = bytearray(data), rng.randrange(max(len(data), 1))
  how = rng.randrange(5)
  if how == 0:
    for _ in range(rng.choice((1, 4))):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif how == 1:
    del data[at:]
  elif how == 2:
    del data[at : at + rng.randrange(1, 20)]
  elif how == 3:
    data[at:at] = data[at : at + rng.randrange(1, 200)]
  else:
    other = (b'\x00' * 8, b'\xff' * 8, b'9' * 30, b'"', b'{', b'\n', b'\xef\xbb\xbf')
    data[at:at] = rng.choice(other)
  return bytes(data)


def safetensors(rng: random.Random, data: bytes) -> bytes:
  """A file whose header, its length or whose bytes are others."""
  length = int.from_bytes(data[:8], 'little')
  how = rng.randrange(6)
  if how == 0:
    return raw(rng, data)
  if how == 1:
    new = rng.choice((0, length - 1, length + 1, 10**9, 2**63, 2**64 - 1))
    return new.to_bytes(8, 'little') + data[8:]
  header = json_text(rng, json.loads(data[8 : 8 + length]))
  return len(header).to_bytes(8, 'little') + header + data[8 + length :]


def npz(rng: random.Random, name: str, array: np.ndarray) -> bytes:
  """An .npz file whose array's header claims something else, or which is damaged."""
  shapes = [(10**9,), (10**9, 10**9), (10**30,), (-1,), (), array.shape[:-1], array.shape]
  kinds = ['<i4', '|O', '<f8', '|V1000000000', '<U1000000', '|S0', 'nonsense', '<i8']
  shape = rng.choice(shapes) if rng.random() < 0.7 else array.shape
  kind = rng.choice(kinds) if rng.random() < 0.5 else '<i4'
  header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n"
  if rng.random() < 0.2:
    header = rng.choice(('(' * DEEP, '{}', '9' * 5000, "{'descr': 1}", '\x00', '[1, 2]')) + '\n'
  body = np.ascontiguousarray(array).tobytes()
  member = b'\x93NUMPY' + bytes(rng.choice(((1, 0), (1, 0), (1, 0), (2, 0), (9, 9))))
  member += (len(header) % 2**16).to_bytes(2, 'little') + header.encode() + body
  out = io.BytesIO()
  kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
  with zipfile.ZipFile(out, 'w', kind) as archive:
    archive.writestr(f'{name}.npy', member)
  data = out.getvalue()
  return raw(rng, data) if rng.random() < 0.3 else data


def _places(value: Any):
  """(holder, key) of every part of a JSON value; of long lists and tables the first few."""
  keys = list(value)[:40] if isinstance(value, dict) else range(min(len(value), 5))
  for key in keys:
    yield value, key
    if isinstance(value[key], (dict, list)):
      yield from _places(value[key])
