"""Writes a checkpoint slice by slice, with memory for one slice at a time."""

import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moe_jax import errors, trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import integrity, stream_layout

T = TypeVar('T')


class Writer:
  """Writes one step slice by slice. A context: a clean exit commits it, an exception drops it.

      with Writer(directory, 0, leaves, meta) as writer:
        writer.write('params/moe_layers/moe/gate_up', (layer, expert, slice(None), 0), gate)

  Until the commit, which is a rename, everything lies under a name that orbax ignores and the next
  attempt (or training run) removes. Hold `atomic_files.lock` of the workdir meanwhile. One thread.

  Args:
    directory: where the steps lie, `W/checkpoints`, on a local disk; made when absent.
    step: optimizer steps done; the name of the checkpoint.
    leaves: nested dict of arrays to come: anything with shape and dtype, `jax.ShapeDtypeStruct`.
    meta: what JSON can hold, as for `checkpointer.Checkpointer.save`.

  Raises:
    errors.InputError: the step exists or the directory is remote; on entry, the disk has too little
      room; on exit, a leaf is not fully written.
  """

  def __init__(
    self, directory: str | os.PathLike[str], step: int, leaves: trees.Tree, meta: trees.Json
  ):
    self._step, self._leaves, self._meta = step, leaves, meta
    self._specs = stream_layout.specs(leaves)
    self._tallies = {
      name: stream_layout.Tally(tuple(spec.shape)) for name, spec in self._specs.items()
    }
    self._stores: dict[str, ts.TensorStore] = {}
    directory = stream_layout.local(directory)
    self._final = directory / str(step)
    self._tmp = directory / f'{step}{stream_layout.TMP_SUFFIX}'
    self._check_free()

  def write(self, name: str, index: stream_layout.Index, array: np.ndarray):
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
    box, shape = stream_layout.select(index, tally.shape)
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
    for block_sum, written in stream_layout.ahead(self._start_blocks(name, box, array)):
      written.result()
      total += block_sum
    tally.add(box, total)

  def _start_blocks(
    self, name: str, box: stream_layout.Box, array: np.ndarray
  ) -> Iterator[tuple[int, Any]]:
    store, shape = self._stores[name], self._tallies[name].shape
    for block in box.blocks(stream_layout.stored_chunk(store)):
      values = np.asarray(array[block.within(box.start)], order='C')
      written = store[block.within((0,) * len(shape))].write(values)
      yield stream_layout.checksum(values, block.start, shape), written

  def _create(self, name: str, extents: tuple[int, ...]) -> ts.TensorStore:
    spec = self._specs[name]
    metadata = {
      'shape': list(spec.shape),
      'chunks': _chunk_shape(extents, spec.dtype.itemsize),
      'compressor': None,
    }
    file = {'driver': 'file', 'path': str(self._tmp / 'state' / stream_layout.array_name(name))}
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
      name: integrity.leaf_record(tally.shape, self._specs[name].dtype, tally.checksum)
      for name, tally in self._tallies.items()
    }
    record = integrity.record(self._step, leaves, self._meta)
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
    chunk[axis] = min(chunk[axis], max(checkpointer_lib.MAX_CHUNK_BYTES // below, 1))
  return chunk


def _write_metadata(step_dir: pathlib.Path, leaves: trees.Tree, record: trees.Json):
  """Everything of a step but its arrays, in orbax's on-disk format."""

  def is_empty(node):
    return isinstance(node, Mapping) and not node

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
