"""Reads a checkpoint slice by slice, with memory for one slice at a time."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from moe_jax import errors
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import stream_layout

T = TypeVar('T')
_INDEX_BYTES = 2**24  # of the database's index, which shares the cache with a large chunk


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
    directory = stream_layout.local(directory)
    with checkpointer_lib.Checkpointer(directory, None, read_only=True) as checkpointer:
      record = checkpointer.read_record(step, tell=True)
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

  def read(self, name: str, index: stream_layout.Index = ()) -> np.ndarray:
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
    box, kept = stream_layout.select(index, shape)
    values, blocks = np.empty(box.extents, self.leaves[name][1]), []
    for block, found in self._blocks(name, box):
      if block == box:
        values = found
      else:
        values[block.within(box.start)] = found
      blocks.append(block)
    if self._verify:
      tally = self._tallies.setdefault(name, stream_layout.Tally(shape))
      if not tally.overlaps(box):
        sums = (stream_layout.checksum(values[b.within(box.start)], b.start, shape) for b in blocks)
        tally.add(box, sum(sums))
        self._compare(name, tally)
    return values.reshape(kept)

  def check(self, name: str):
    """Reads a whole leaf, chunk by chunk, and compares it with its checksum.

    Raises:
      errors.InputError: it is damaged.
    """
    shape = self.leaves[name][0]
    whole, total = stream_layout.Box((0,) * len(shape), shape), 0
    for block, values in self._blocks(name, whole):
      total += stream_layout.checksum(values, block.start, shape)
    tally = stream_layout.Tally(shape)
    tally.add(whole, total)
    self._compare(name, tally)

  def _blocks(
    self, name: str, box: stream_layout.Box
  ) -> Iterator[tuple[stream_layout.Box, np.ndarray]]:
    origin = (0,) * len(box.start)
    try:
      store = self._open(name)
      blocks = box.blocks(stream_layout.stored_chunk(store))
      for block, values in stream_layout.ahead((b, store[b.within(origin)].read()) for b in blocks):
        yield block, values.result()
    except (ValueError, OSError) as e:  # what tensorstore raises for files that are gone or broken
      raise self._damaged(name, f'cannot be read ({str(e).splitlines()[0][:200]})') from e

  def _open(self, name: str) -> ts.TensorStore:
    if name in self._stores:
      return self._stores[name]
    known, large = self._large
    if large is not None and known == name:
      return large
    store = self._open_with(name, cache_bytes=0)
    chunk_bytes = math.prod(stream_layout.stored_chunk(store)) * self.leaves[name][1].itemsize
    if chunk_bytes <= 2 * checkpointer_lib.MAX_CHUNK_BYTES:
      self._stores[name] = store
      return store
    large, self._large = None, ('', None)  # frees the chunk of the array before
    room = chunk_bytes + _INDEX_BYTES
    large = self._open_with(name, cache_bytes=room)
    self._large = (name, large)
    return large

  def _open_with(self, name: str, cache_bytes: int) -> ts.TensorStore:
    if self._packed:
      base = {'driver': 'file', 'path': f'{self._state}/'}
      kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{stream_layout.array_name(name)}/'}
    else:
      kvstore = {'driver': 'file', 'path': str(self._state / stream_layout.array_name(name))}
    request = {
      'driver': 'zarr',
      'kvstore': kvstore,
      'fill_missing_data_reads': False,
      'recheck_cached_data': False,  # a step never changes
    }
    context = ts.Context({'cache_pool': {'total_bytes_limit': cache_bytes}})
    return ts.open(request, context=context, read=True).result()

  def _compare(self, name: str, tally: stream_layout.Tally):
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
