"""Checkpoints slice by slice: a converter's way in and out, with memory for one slice at a time.

A step written here lies on disk as one written by `checkpoint.Checkpointer` and restores like it,
to any sharding, with the same record of checksums. Two things differ. Every array is a directory of
plain zarr chunks, one file each and uncompressed (bfloat16 weights shrink by a fifth only, and the
size is known beforehand), where a training run packs its chunks into a database whose index would
be rewritten with every slice. And the chunks of an array have the extents of the first slice that
was written, so that no slice rewrites a chunk that another one filled.
"""

import collections
import dataclasses
import itertools
import json
import math
import operator
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moe_jax import checkpoint, errors

T = TypeVar('T')
Index = int | slice | tuple[int | slice, ...]

_IN_FLIGHT = 4  # chunks being read or written at once: keeps a disk busy, and memory small
_TILE = 2**16  # elements whose checksum is taken at once: what the processor's cache holds
_INDEX_BYTES = 2**24  # of the database's index, which shares the cache with a large chunk
_TMP_SUFFIX = '.orbax-checkpoint-tmp'  # of names that orbax ignores, and a training run cleans up


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
  """`bits.mix` in place."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    np.right_shift(x, np.uint32(shift), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    if factor != 1:
      np.multiply(x, np.uint32(factor), out=x)


@dataclasses.dataclass(frozen=True)
class _Box:
  """A rectangular part of an array: [start, stop) per axis."""

  start: tuple[int, ...]
  stop: tuple[int, ...]

  @property
  def extents(self) -> tuple[int, ...]:
    return tuple(map(operator.sub, self.stop, self.start))

  def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """Selects the box in an array whose first element is at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin))

  def blocks(self, chunk: tuple[int, ...]) -> Iterator['_Box']:
    """The parts of the box that lie in one chunk each."""
    ranges = [
      [(max(a, c), min(b, c + size)) for c in range(a // size * size, b, size)]
      for a, b, size in zip(self.start, self.stop, chunk)
    ]
    for pairs in itertools.product(*ranges):
      yield _Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def _select(index: Index, shape: tuple[int, ...]) -> tuple[_Box, tuple[int, ...]]:
  """The box of an index over leading axes, and the shape of its values, without the int axes."""
  index = index if isinstance(index, tuple) else (index,)
  if len(index) > len(shape):
    raise ValueError(f'index {index} has more axes than an array of shape {list(shape)}.')
  bounds, kept = [], []
  for part, size in itertools.zip_longest(index, shape, fillvalue=slice(None)):
    if isinstance(part, slice):
      first, last, step = part.indices(size)
      bounds.append((first, max(first, last)))
      kept.append(bounds[-1][1] - first)
    else:
      first, step = operator.index(part), 1
      bounds.append((first, first + 1))
    if step != 1 or not 0 <= bounds[-1][0] <= bounds[-1][1] <= size:
      raise ValueError(f'index {index} is no block of an array of shape {list(shape)}.')
  return _Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds)), tuple(kept)


class _Tally:
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

  def overlaps(self, box: _Box) -> bool:
    """Whether elements of the box have passed by."""
    bounds = self._bounds[: self._count]
    return bool(((bounds[:, 0] < box.stop) & (bounds[:, 1] > box.start)).all(-1).any())

  def add(self, box: _Box, block_checksum: int):
    if not math.prod(box.extents):
      return
    if self._count == len(self._bounds):
      self._bounds = np.concatenate([self._bounds, np.empty_like(self._bounds)])
    self._bounds[self._count] = box.start, box.stop
    self._count += 1
    self.seen += math.prod(box.extents)
    self.checksum = (self.checksum + block_checksum) % 2**32


def _ahead(started: Iterable[T]) -> Iterator[T]:
  """Draws a few items ahead of those it yields: each is an operation that starts when drawn."""
  waiting = collections.deque()
  for item in started:
    waiting.append(item)
    if len(waiting) == _IN_FLIGHT:
      yield waiting.popleft()
  yield from waiting


class Writer:
  """Writes one step slice by slice. A context: a clean exit commits it, an exception drops it.

      with Writer(directory, 0, leaves, meta) as writer:
        writer.write('params/moe_layers/moe/gate_up', (layer, expert, slice(None), 0), gate)

  Until the commit, which is a rename, everything lies under a name that orbax ignores and the next
  attempt (or training run) removes. Hold `files.lock` of the workdir meanwhile. One thread.

  Args:
    directory: where the steps lie, `W/checkpoints`, on a local disk; made when absent.
    step: optimizer steps done; the name of the checkpoint.
    leaves: nested dict of arrays to come: anything with shape and dtype, `jax.ShapeDtypeStruct`.
    meta: what JSON can hold, as for `checkpoint.Checkpointer.save`.

  Raises:
    errors.InputError: the step exists or the directory is remote; on entry, the disk has too little
      room; on exit, a leaf is not fully written.
  """

  def __init__(
    self, directory: str | os.PathLike[str], step: int, leaves: Any, meta: Mapping[str, Any]
  ):
    self._step, self._leaves, self._meta = step, leaves, meta
    self._specs = _specs(leaves)
    self._tallies = {name: _Tally(tuple(spec.shape)) for name, spec in self._specs.items()}
    self._stores: dict[str, ts.TensorStore] = {}
    directory = _local(directory)
    self._final = directory / str(step)
    self._tmp = directory / f'{step}{_TMP_SUFFIX}'
    self._check_free()

  def write(self, name: str, index: Index, array: np.ndarray):
    """Writes one slice of one leaf; on return it is on disk.

    Args:
      name: path of the leaf, 'params/embed/embedding'.
      index: ints and slices (of step 1) over the leading axes; () for the whole leaf. An axis given
        as an int is absent from `array`. Slices of equal extents make the fastest files.
      array: the values, of the leaf's dtype; a transposed view is fine.

    Raises:
      ValueError: no such leaf, another shape or dtype, or part of the slice is written already.
    """
    if name not in self._specs:
      raise ValueError(
        f'{name!r} is not a leaf of this checkpoint{errors.did_you_mean(name, self._specs)}.'
      )
    spec, tally = self._specs[name], self._tallies[name]
    box, shape = _select(index, tally.shape)
    array = np.asarray(array)
    if array.shape != shape or array.dtype != spec.dtype:
      raise ValueError(
        f'slice {index} of {name} takes {spec.dtype}{list(shape)}, not '
        f'{array.dtype}{list(array.shape)}.'
      )
    if tally.overlaps(box):
      raise ValueError(f'{name}: part of {index} is already written.')
    array = array.reshape(box.extents)  # a view: only axes of length 1 come in
    if name not in self._stores:
      self._stores[name] = self._create(name, box.extents)
    total = 0
    for block_sum, written in _ahead(self._start_blocks(name, box, array)):
      written.result()
      total += block_sum
    tally.add(box, total)

  def _start_blocks(self, name: str, box: _Box, array: np.ndarray) -> Iterator[tuple[int, Any]]:
    store, shape = self._stores[name], self._tallies[name].shape
    for block in box.blocks(_stored_chunk(store)):
      values = np.asarray(array[block.within(box.start)], order='C')
      written = store[block.within((0,) * len(shape))].write(values)
      yield checksum(values, block.start, shape), written

  def _create(self, name: str, extents: tuple[int, ...]) -> ts.TensorStore:
    spec = self._specs[name]
    metadata = {
      'shape': list(spec.shape),
      'chunks': _chunk_shape(extents, spec.dtype.itemsize),
      'compressor': None,
    }
    file = {'driver': 'file', 'path': str(self._tmp / 'state' / _array_name(name))}
    request = {
      'driver': 'zarr',
      'kvstore': file,
      'metadata': metadata,
      'store_data_equal_to_fill_value': True,  # a missing file is then always damage
    }
    return ts.open(request, dtype=spec.dtype.name, create=True).result()

  def _commit(self):
    """Makes the step visible, if it is whole."""
    missing = [name for name, tally in self._tallies.items() if not tally.complete]
    if missing:
      first = self._tallies[missing[0]]
      raise errors.InputError(
        f'{missing[0]} got {first.seen} of its {math.prod(first.shape)} elements, the first of '
        f'{len(missing)} unfinished arrays of step {self._step} in {self._final.parent}, which was '
        'therefore not written; the source must hold every weight of the model'
      )
    leaves = {
      name: checkpoint.leaf_record(tally.shape, self._specs[name].dtype, tally.checksum)
      for name, tally in self._tallies.items()
    }
    record = checkpoint.record(self._step, leaves, self._meta)
    _write_metadata(self._tmp, self._leaves, record)
    self._check_free()
    self._tmp.rename(self._final)

  def _check_free(self):
    if self._final.exists():
      raise errors.InputError(
        f'step={self._step} is already among the checkpoints in {self._final.parent}, and nothing '
        'is overwritten; choose another --workdir'
      )

  def __enter__(self) -> 'Writer':
    if self._tmp.exists():
      shutil.rmtree(self._tmp)  # a killed attempt
    _check_room(self._final.parent, self._specs)
    (self._tmp / 'state').mkdir(parents=True)
    return self

  def __exit__(self, kind: Any, *unused):
    try:
      if kind is None:
        self._commit()
    finally:
      self._stores.clear()
      # Writes still under way may add a file while the directory goes; its name says what it is.
      shutil.rmtree(self._tmp, ignore_errors=True)


class Reader:
  """Reads one step slice by slice; the arrays are opened when first asked for.

  Nothing less than a chunk can be read. Those that `Writer` and this version's training runs write
  are small. Of an array with chunks above 64 MiB the chunk read last is kept in memory, of one
  array at a time: read all slices of it before those of the next.

  Args:
    directory: where the steps lie, `W/checkpoints`, on a local disk.
    step: the step wanted; None for the newest with a readable record.
    verify: compare every array with its checksum once all of its slices have been read; what was
      read in part is read wholly when the context is left.

  Raises:
    errors.InputError: there is no such step, or its record is damaged.
  """

  def __init__(
    self, directory: str | os.PathLike[str], step: int | None = None, *, verify: bool = False
  ):
    directory = _local(directory)
    with checkpoint.Checkpointer(directory, None, read_only=True) as checkpointer:
      record = checkpointer.read_record(step)
    if record is None:
      raise errors.InputError(f'{directory} holds no checkpoints; train or import a model first')
    self.step: int = record['step']
    self.meta: dict[str, Any] = record['meta']
    self.leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {
      name: (tuple(leaf['shape']), jnp.dtype(leaf['dtype']))
      for name, leaf in record['leaves'].items()
    }
    self._checksums = {name: leaf['checksum'] for name, leaf in record['leaves'].items()}
    self._verify, self._tallies = verify, {}
    self._state = directory / str(self.step) / 'state'
    self._packed = json.loads((self._state / '_METADATA').read_text())['use_ocdbt']
    self._stores: dict[str, ts.TensorStore] = {}
    self._large: tuple[str, ts.TensorStore | None] = ('', None)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """One slice of one leaf; an axis given as an int is absent from it.

    Args:
      name: a key of `leaves`.
      index: ints and slices (of step 1) over the leading axes; () for the whole leaf.

    Raises:
      errors.InputError: its files are damaged, or `verify` found a wrong checksum.
      ValueError: no such leaf, or the index does not fit.
    """
    if name not in self.leaves:
      raise ValueError(
        f'{name!r} is not a leaf of this checkpoint{errors.did_you_mean(name, self.leaves)}.'
      )
    shape = self.leaves[name][0]
    box, kept = _select(index, shape)
    values, blocks = np.empty(box.extents, self.leaves[name][1]), []
    for block, found in self._blocks(name, box):
      if block == box:
        values = found
      else:
        values[block.within(box.start)] = found
      blocks.append(block)
    if self._verify:
      tally = self._tallies.setdefault(name, _Tally(shape))
      if not tally.overlaps(box):
        sums = (checksum(values[b.within(box.start)], b.start, shape) for b in blocks)
        tally.add(box, sum(sums))
        self._compare(name, tally)
    return values.reshape(kept)

  def check(self, name: str):
    """Reads a whole leaf, chunk by chunk, and compares it with its checksum.

    Raises:
      errors.InputError: it is damaged.
    """
    shape = self.leaves[name][0]
    whole, total = _Box((0,) * len(shape), shape), 0
    for block, values in self._blocks(name, whole):
      total += checksum(values, block.start, shape)
    tally = _Tally(shape)
    tally.add(whole, total)
    self._compare(name, tally)

  def _blocks(self, name: str, box: _Box) -> Iterator[tuple[_Box, np.ndarray]]:
    origin = (0,) * len(box.start)
    try:
      store = self._open(name)
      blocks = box.blocks(_stored_chunk(store))
      for block, found in _ahead((b, store[b.within(origin)].read()) for b in blocks):
        yield block, found.result()
    except (ValueError, OSError) as e:  # what tensorstore raises for files that are gone or broken
      raise self._damaged(name, f'cannot be read ({str(e).splitlines()[0][:200]})') from e

  def _open(self, name: str) -> ts.TensorStore:
    for known, store in (*self._stores.items(), self._large):
      if known == name:
        return store
    store = self._open_with(name, cache_bytes=0)
    chunk_bytes = math.prod(_stored_chunk(store)) * self.leaves[name][1].itemsize
    if chunk_bytes <= 2 * checkpoint.MAX_CHUNK_BYTES:
      self._stores[name] = store
      return store
    self._large = ('', None)  # frees the chunk of the array before
    room = chunk_bytes + _INDEX_BYTES
    self._large = (name, self._open_with(name, cache_bytes=room))
    return self._large[1]

  def _open_with(self, name: str, cache_bytes: int) -> ts.TensorStore:
    if self._packed:
      base = {'driver': 'file', 'path': f'{self._state}/'}
      kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{_array_name(name)}/'}
    else:
      kvstore = {'driver': 'file', 'path': str(self._state / _array_name(name))}
    request = {
      'driver': 'zarr',
      'kvstore': kvstore,
      'fill_missing_data_reads': False,
      'recheck_cached_data': False,  # a step never changes
    }
    context = ts.Context({'cache_pool': {'total_bytes_limit': cache_bytes}})
    return ts.open(request, context=context, read=True).result()

  def _compare(self, name: str, tally: _Tally):
    if tally.complete and tally.checksum != self._checksums[name]:
      raise self._damaged(name, 'differs from its checksum')

  def _damaged(self, name: str, what: str) -> errors.InputError:
    return errors.InputError(
      f'{name} of checkpoint step {self.step} in {self._state.parent.parent} {what}; use another '
      'step, or write it again from its source'
    )

  def __enter__(self) -> 'Reader':
    return self

  def __exit__(self, kind: Any, *unused):
    if kind is None:
      for name, tally in self._tallies.items():
        if not tally.complete:
          self.check(name)
    self._stores.clear()
    self._large = ('', None)


def _specs(leaves: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype by name."""
  specs = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
    name, spec = checkpoint.leaf_name(path), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if spec.dtype.itemsize not in (1, 2, 4) or not math.prod(spec.shape):
      raise ValueError(f'{name}: {spec.dtype}{list(spec.shape)} cannot be stored with a checksum.')
    specs[name] = spec
  return specs


def _local(directory: str | os.PathLike[str]) -> pathlib.Path:
  if '://' in str(directory):
    raise errors.InputError(
      f'--workdir={directory} is not on a local disk, where alone weights can be written and read '
      'slice by slice; use a local directory and copy it'
    )
  return pathlib.Path(os.path.abspath(directory))


def _check_room(directory: pathlib.Path, specs: Mapping[str, jax.ShapeDtypeStruct]):
  needed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
  existing = next(path for path in (directory, *directory.parents) if path.is_dir())
  free = shutil.disk_usage(existing).free
  if needed > free:
    raise errors.InputError(
      f'{directory} has {free / 1e9:.1f} GB free where a checkpoint of {needed / 1e9:.1f} GB is to '
      'be written; make room, or choose another --workdir'
    )


def _chunk_shape(extents: tuple[int, ...], itemsize: int) -> list[int]:
  """The extents of a slice, cut along its first axes to at most MAX_CHUNK_BYTES."""
  chunk = [max(size, 1) for size in extents]
  for axis in range(len(chunk)):
    below = math.prod(chunk[axis + 1 :]) * itemsize
    chunk[axis] = min(chunk[axis], max(checkpoint.MAX_CHUNK_BYTES // below, 1))
  return chunk


def _stored_chunk(store: ts.TensorStore) -> tuple[int, ...]:
  return store.chunk_layout.write_chunk.shape or ()  # None for a scalar


def _array_name(name: str) -> str:
  """What orbax calls an array on disk."""
  return name.replace('/', '.')


def _write_metadata(step_dir: pathlib.Path, leaves: Any, record: Mapping[str, Any]):
  """Everything of a step but its arrays, in orbax's on-disk format."""
  is_empty = lambda node: isinstance(node, Mapping) and not node
  nodes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(leaves, is_leaf=is_empty):
    keys = tuple(str(entry.key) for entry in path)
    empty = is_empty(leaf)
    nodes[str(keys)] = {
      'key_metadata': [{'key': key, 'key_type': 2} for key in keys],  # 2: key of a dict
      'value_metadata': {'value_type': 'Dict' if empty else 'jax.Array', 'skip_deserialize': empty},
    }
  state = {
    'tree_metadata': nodes,
    'use_ocdbt': False,
    'use_zarr3': False,
    'store_array_data_equal_to_fill_value': True,
    'custom_metadata': None,
  }
  handlers = {'state': ocp.StandardCheckpointHandler, 'meta': ocp.JsonCheckpointHandler}
  step = {
    'item_handlers': {item: f'{h.__module__}.{h.__qualname__}' for item, h in handlers.items()},
    'metrics': {},
    'performance_metrics': {},
    'init_timestamp_nsecs': time.time_ns(),
    'commit_timestamp_nsecs': time.time_ns(),
    'custom_metadata': {},
  }
  (step_dir / 'meta').mkdir()
  (step_dir / 'state/_METADATA').write_text(json.dumps(state))
  (step_dir / 'meta/metadata').write_text(json.dumps(record))
  (step_dir / '_CHECKPOINT_METADATA').write_text(json.dumps(step))
  for item in ('state', 'meta', '.'):  # asked for where orbax cannot rely on renames, after a copy
    (step_dir / item / 'commit_success.txt').write_text('written slice by slice')
