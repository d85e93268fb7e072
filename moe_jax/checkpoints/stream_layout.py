"""Checkpoints slice by slice: a converter's way in and out, with memory for one slice at a time.

A step written here lies on disk as one written by `checkpointer.Checkpointer` and restores like it,
to any sharding, with the same record of checksums. Two things differ. Every array is a directory of
plain zarr chunks, one file each and uncompressed (bfloat16 weights shrink by a fifth only, and the
size is known beforehand), where a training run packs its chunks into a database whose index would
be rewritten with every slice. And the chunks of an array have the extents of the first slice that
was written, so that no slice rewrites a chunk that another one filled.
"""

import collections
import dataclasses
import itertools
import math
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, cast

import jax
import numpy as np
import tensorstore as ts

from moe_jax import errors, trees
from moe_jax.checkpoints import integrity

T = TypeVar('T')
Index = int | slice | tuple[int | slice, ...]

_IN_FLIGHT = 4  # chunks being read or written at once: keeps a disk busy, and memory small
_TILE = 2**16  # elements whose checksum is taken at once: what the processor's cache holds
TMP_SUFFIX = '.orbax-checkpoint-tmp'  # of names that orbax ignores, and a training run cleans up


def checksum(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """What a block of an array adds, modulo 2^32, to the checksum of the whole.

  Args:
    block: elements of 1, 2 or 4 bytes, as many axes as the array.
    start: position of the block's first element in the array.
    shape: of the whole array.
  """
  block = np.asarray(block, order='C')
  # The last axes that the block spans are one run of neighbours in the array; a row is such a run.
  axis = block.ndim
  while axis and block.shape[axis - 1] == shape[axis - 1]:
    axis -= 1
  axis = max(axis - 1, 0)
  offset = np.zeros((), np.uint64)  # wraps at 2^64, a multiple of the 2^32 that counts
  stride = 1
  for i in reversed(range(block.ndim)):
    length = block.shape[i] if i < axis else 1
    steps = (start[i] + np.arange(length, dtype=np.uint64)) * np.uint64(stride % 2**32)
    offset = steps.reshape(-1, *[1] * offset.ndim) + offset
    stride *= shape[i]
  offset = ((offset + np.uint64(0x9E3779B9)) % 2**32).astype(np.uint32).reshape(-1, 1)
  bits = block.view(f'u{block.dtype.itemsize}').reshape(len(offset), -1)
  return _sum_of_rows(bits, offset)


def _sum_of_rows(bits: np.ndarray, offset: np.ndarray) -> int:
  """Sum over mixed bits [rows, width] whose positions are offset [rows, 1] + 0 .. width - 1."""
  width = min(bits.shape[1], _TILE)
  height = max(_TILE // max(width, 1), 1)
  column = np.arange(width, dtype=np.uint32)
  mixed, scratch = np.empty((2, height, width), np.uint32)
  total = 0
  for row in range(0, bits.shape[0], height):
    for first in range(0, bits.shape[1], width):
      tile = bits[row : row + height, first : first + width]
      x = mixed[: tile.shape[0], : tile.shape[1]]
      y = scratch[: tile.shape[0], : tile.shape[1]]
      base = offset[row : row + height] + np.uint32(first % 2**32)
      np.add(base, column[: tile.shape[1]], out=x)
      _mix(x, y)
      np.bitwise_xor(x, tile, out=x)
      _mix(x, y)
      total += int(x.sum(dtype=np.uint64))
  return total % 2**32


def _mix(x: np.ndarray, scratch: np.ndarray):
  """`integer_hash.mix` in place."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    np.right_shift(x, np.uint32(shift), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    if factor != 1:
      np.multiply(x, np.uint32(factor), out=x)


@dataclasses.dataclass(frozen=True)
class Box:
  """A rectangular part of an array: [start, stop) per axis."""

  start: tuple[int, ...]
  stop: tuple[int, ...]

  @property
  def extents(self) -> tuple[int, ...]:
    return tuple(map(operator.sub, self.stop, self.start))

  def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """Selects the box in an array whose first element is at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin))

  def blocks(self, chunk: tuple[int, ...]) -> Iterator['Box']:
    """The parts of the box that lie in one chunk each."""
    ranges = [
      [(max(a, c), min(b, c + size)) for c in range(a // size * size, b, size)]
      for a, b, size in zip(self.start, self.stop, chunk)
    ]
    for pairs in itertools.product(*ranges):
      yield Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def select(index: Index, shape: tuple[int, ...]) -> tuple[Box, tuple[int, ...]]:
  """The box of an index over leading axes, and the shape of its values, without the int axes."""
  index = index if isinstance(index, tuple) else (index,)
  if len(index) > len(shape):
    raise ValueError(f'index {index} has more axes than an array of shape {list(shape)}.')
  bounds, kept = [], []
  for part, size in zip((*index, *(slice(None),) * (len(shape) - len(index))), shape):
    if isinstance(part, slice):
      first, last, step = part.indices(size)
      bounds.append((first, max(first, last)))
      kept.append(bounds[-1][1] - first)
    else:
      first, step = operator.index(part), 1
      bounds.append((first, first + 1))
    if step != 1 or not 0 <= bounds[-1][0] <= bounds[-1][1] <= size:
      raise ValueError(f'index {index} is no block of an array of shape {list(shape)}.')
  return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds)), tuple(kept)


class Tally:
  """Which elements of an array have passed by, and the checksum of those."""

  def __init__(self, shape: tuple[int, ...]):
    self.shape = shape
    self.seen = 0
    self.checksum = 0
    self._bounds = np.empty((16, 2, len(shape)), np.int64)  # start and stop of each box so far
    self._count = 0

  @property
  def complete(self) -> bool:
    return self.seen == math.prod(self.shape)

  def overlaps(self, box: Box) -> bool:
    """Whether elements of the box have passed by."""
    bounds = self._bounds[: self._count]
    return bool(((bounds[:, 0] < box.stop) & (bounds[:, 1] > box.start)).all(-1).any())

  def add(self, box: Box, block_checksum: int):
    if not math.prod(box.extents):
      return
    if self._count == len(self._bounds):
      self._bounds = np.concatenate([self._bounds, np.empty_like(self._bounds)])
    self._bounds[self._count] = box.start, box.stop
    self._count += 1
    self.seen += math.prod(box.extents)
    self.checksum = (self.checksum + block_checksum) % 2**32


def ahead(started: Iterable[T]) -> Iterator[T]:
  """Draws a few items ahead of those it yields: each is an operation that starts when drawn."""
  waiting = collections.deque()
  for item in started:
    waiting.append(item)
    if len(waiting) == _IN_FLIGHT:
      yield waiting.popleft()
  yield from waiting


def specs(leaves: trees.Tree) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype by name."""
  specs = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
    name, spec = integrity.leaf_name(path), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if spec.dtype.itemsize not in (1, 2, 4) or not math.prod(spec.shape):
      raise ValueError(f'{name}: {spec.dtype}{list(spec.shape)} cannot be stored with a checksum.')
    specs[name] = spec
  return specs


def local(directory: str | os.PathLike[str]) -> pathlib.Path:
  """The absolute path of a directory on a local disk.

  Raises:
    errors.InputError: it is the address of an object store.
  """
  if '://' in str(directory):
    raise errors.InputError(
      f'--workdir={directory} is not on a local disk, where alone weights can be written and read '
      'slice by slice; use a local directory and copy it'
    )
  return pathlib.Path(os.path.abspath(directory))


def stored_chunk(store: ts.TensorStore) -> tuple[int, ...]:
  """Shape of the chunks that an array is stored in; () for a scalar."""
  shape = store.chunk_layout.write_chunk.shape or ()  # None for a scalar
  return tuple(cast(Sequence[int], shape))  # of an open array, none is left undecided


def array_name(name: str) -> str:
  """What orbax calls an array on disk."""
  return name.replace('/', '.')
