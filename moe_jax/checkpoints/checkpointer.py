"""Checkpoints on orbax: training state, meta data and an integrity record in one atomic step.

Orbax writes a step asynchronously and renames it into place when it is complete. What it does not
do is notice damage: flipped bytes in a chunk restore silently, and an empty or half-copied step
directory is offered as the newest one. So every step also records a checksum per array, computed on
the devices before the save and again after a restore, and `restore` walks from the newest step to
the oldest until one is whole. It never starts from zero while there are steps on disk, and a
damaged step is moved aside, never deleted.

Layout: `<directory>/<step>/{state,meta}`. Moved aside, where orbax does not look:
`<directory>/<step>.damaged-<k>`. `stream_writer` and `stream_reader` do the same slice by slice,
for weights that do not fit into memory.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from moe_jax import atomic_files, errors, trees
from moe_jax.checkpoints import integrity, orbax_noise, parts_handler
from moe_jax.config import schema
from moe_jax.storage import parts as parts_lib

# Nothing less than a chunk can be read, so arrays above MAX_CHUNK_BYTES are cut up on disk; along
# the axes of a stack of layers and experts as long as the chunks stay above MIN_CHUNK_BYTES.
MAX_CHUNK_BYTES, MIN_CHUNK_BYTES = 32 * 2**20, 2**20
LOOKS = 10  # how often a reader looks for newer steps when all that it saw were deleted
_LOOK_SECONDS = 0.02
_MOVED_ASIDE = re.compile(r'\d+\.(damaged|superseded)-\d+')


@dataclasses.dataclass(frozen=True)
class Restored:
  """One whole checkpoint: the state on its devices and the meta saved with it (plus `step`)."""

  state: trees.Tree
  meta: dict[str, Any]
  step: int


class _DamagedError(Exception):
  """Why a step cannot be trusted; callers fall back to an older one."""


class Checkpointer:
  """Saves and restores the steps of one run.

  Args:
    directory: where the steps lie, `W/checkpoints`; made when the first writer opens it.
    cfg: how often to save and what to keep; None for a reader.
    read_only: a reader renames, deletes and creates nothing, so it may look at a run in progress.
    parts: of a writer whose processes have a disk each, with the same steps on all; carries their
      parts of new steps to process 0.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    cfg: schema.CheckpointConfig | None,
    *,
    read_only: bool = False,
    parts: parts_lib.Parts | None = None,
  ):
    orbax_noise.drop_orbax_chatter()
    remote = '://' in str(directory)
    self._directory = epath.Path(directory if remote else os.path.abspath(directory))
    errors.require(
      remote or self._directory.exists() or not os.path.islink(self._directory),
      f'{self._directory} is a link to what is not there; mount or restore it, or use another '
      '--workdir',
    )
    writer = None if read_only else cfg
    self._cfg = writer
    self._may_save = False  # until `restore` has settled which steps the new ones follow
    self._parts = parts
    if parts is not None:
      self._directory.mkdir(parents=True, exist_ok=True)  # orbax does on process 0 only
    self._manager = ocp.CheckpointManager(
      self._directory, options=_options(writer, parts), handler_registry=_handlers(parts)
    )
    self._reader = _reader()
    self._prepared: concurrent.futures.Future[None] | None = None
    self._bytes, self._is_full = 0, False

  def steps(self) -> list[int]:
    """Steps on disk or being written, oldest first; whether they are whole is not checked."""
    return sorted({*self._manager.all_steps(), *self._not_directories()})

  def _not_directories(self) -> list[int]:
    """Steps that orbax passes over in silence: links to what is gone, and plain files."""
    try:
      names = os.listdir(self._directory)
    except (FileNotFoundError, NotADirectoryError):
      return []
    where = (name for name in names if name.isdecimal() and str(int(name)) == name)
    return [int(name) for name in where if not (self._directory / name).is_dir()]

  def is_due(self, step: int) -> bool:
    """Whether `step` is one at which the schedule saves."""
    return self._cfg is not None and step % self._cfg.save_every == 0

  def prepare(self, abstract_state: trees.Tree):
    """Compiles in the background what a save runs, so that the first one does not stall training.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` with the shardings of what will be saved.
    """
    worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checksums')
    self._prepared = worker.submit(integrity.compile_checksums, abstract_state)
    worker.shutdown(wait=False)

  def save(
    self,
    step: int,
    state: trees.Tree,
    meta: trees.Json,
    *,
    force: bool = False,
    allow_nonfinite: bool = False,
  ) -> bool:
    """Starts writing `state` and `meta` as one step and returns once the state may be donated.

    Args:
      step: optimizer steps done; the name of the checkpoint.
      state: pytree of arrays.
      meta: what JSON can hold: the resolved config, the data fingerprint.
      force: save also when `step` is not a multiple of `save_every` (the last step, a signal).
      allow_nonfinite: save NaN and infinity, for an inquest.

    Returns:
      Whether a save was started; False off schedule, or when this run has that step already.
    """
    if self._cfg is None:
      raise ValueError(
        f'The checkpointer of {self._directory} only reads; give it a config to save.'
      )
    if not self._may_save and self.steps():
      raise ValueError(f'{self._directory} holds checkpoints: call restore before the first save.')
    self._may_save = True
    if not (force or self.is_due(step)) or step in self.steps():
      return False
    if self._prepared is not None:
      self._prepared.result()
    json_item = integrity.record(step, integrity.leaf_records(state, allow_nonfinite), meta)
    arrays = ocp.args.StandardSave(state, save_args=jax.tree.map(_save_args, state))
    items = ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(json_item))
    self._wait_for_parts()
    # Orbax's own rules for when to save are switched off: the schedule is decided above.
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with self._writing():
      return self._manager.save(step, args=items, force=True)

  def restore(
    self,
    abstract_state: trees.Tree | Callable[[dict[str, Any]], trees.Tree],
    step: int | None = None,
    *,
    partial: bool = False,
  ) -> Restored | None:
    """Restores the newest whole step, or exactly `step`.

    A writer then moves every newer step aside: new steps follow the restored one, can take their
    numbers, and keep_last counts whole checkpoints only.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` with the shardings to restore to; or what
        makes it of the meta of the step that is tried, where steps may have other configs.
      step: the step wanted; None for the newest whole one.
      partial: read only the arrays of `abstract_state`, say the dict of `params` and
        `router_state`, whatever else the checkpoint holds. A step is whole if these are.

    Returns:
      None when there are no steps at all.

    Raises:
      errors.InputError: `step` is missing or damaged, every step is damaged, or the checkpoint
        lacks arrays of `abstract_state`, has others of that name or, unless `partial`, has more.
    """
    self._reload()
    if step is not None:
      self._require_step(step)
    orbax_noise.drop_abandoned_reads()
    damaged = {}
    for candidate in [step] if step is not None else self._newest_first():
      try:
        restored = self._restore_whole(candidate, abstract_state, partial)
      except _DamagedError as e:
        damaged[candidate] = str(e)
        continue
      self._forget_deleted(damaged)
      # Only with one step proved whole under the same target are the others called damaged: had
      # none worked, the fault might be ours (memory, a lost disk), and nothing must be moved.
      self._settle(candidate, damaged)
      return restored
    if damaged:
      raise errors.InputError(self._none_whole(damaged))
    self._require_no_remains()
    self._may_save = True
    return None

  def read_meta(self, step: int | None = None) -> dict[str, Any] | None:
    """Meta of `step`, or of the newest step whose meta is readable, without restoring arrays.

    For what is checked or shown before arrays are read. `restore` may still fall back to an older
    step; the meta that belongs to the arrays is `Restored.meta`.

    Returns:
      None when there are no steps at all.

    Raises:
      errors.InputError: `step` is missing or damaged, or no step has a readable meta.
    """
    meta = self.read_record(step)
    return None if meta is None else meta['meta']

  def read_record(self, step: int | None = None, *, tell: bool = False) -> dict[str, Any] | None:
    """What `integrity.record` made of `step`, or of the newest step where it is readable.

    See `read_meta`. With `tell` a warning names the newer steps that were passed over; `restore`
    says that of its own.
    """
    self._reload()
    if step is not None:
      self._require_step(step)
    orbax_noise.drop_abandoned_reads()
    damaged = {}
    for candidate in [step] if step is not None else self._newest_first():
      try:
        found = self._read_record(candidate)
      except _DamagedError as e:
        damaged[candidate] = str(e)
        continue
      self._forget_deleted(damaged)
      if tell:
        self._tell_damaged(damaged, candidate)
      return found
    if damaged:
      raise errors.InputError(self._none_whole(damaged))
    return None

  def wait(self):
    """Blocks until the save in flight is on disk, and raises what went wrong with it."""
    self._wait_for_parts()
    with self._writing():
      self._manager.wait_until_finished()

  def _wait_for_parts(self):
    """Raises what went wrong with a hand-over of parts.

    Orbax would not: its threads wait for the other processes first, and those for this one.
    """
    while self._parts is not None and self._manager.is_saving_in_progress():
      self._parts.check()
      time.sleep(_LOOK_SECONDS)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """`atomic_files.told_if_full` of a step, which remembers that it has told."""
    target = self._directory / 'a checkpoint'
    try:
      with atomic_files.told_if_full(target, self._bytes, self._last_saved):
        yield
    except errors.InputError:  # orbax raises none of its own
      self._is_full = True
      raise

  def _last_saved(self) -> str:
    names = os.listdir(self._directory) if os.path.isdir(self._directory) else []
    saved = max((int(name) for name in names if name.isdecimal()), default=None)
    return 'no step is saved yet' if saved is None else f'step {saved} is the last one saved'

  def close(self):
    """Waits for the save in flight and frees the threads."""
    was_full = self._is_full  # and has been told
    if self._parts is not None and self._parts.failure is not None:
      return  # the process ends, and orbax would wait for ever
    try:
      self._wait_for_parts()
      with self._writing():
        self._manager.close()
    except errors.InputError:
      if not was_full:
        raise
    finally:
      self._reader.close()

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *unused_exc):
    self.close()

  def _reload(self):
    self.wait()
    self._manager.reload()

  def _newest_first(self) -> Iterator[int]:
    """Steps to try, newest first.

    The run that a reader looks at goes on, and may delete a step while it is read; so a reader that
    has tried all of them looks whether newer ones have come, LOOKS times at most.
    """
    tried: set[int] = set()
    alone = self._cfg is None and jax.process_count() == 1
    for _ in range(LOOKS if alone else 1):
      fresh = [step for step in reversed(self.steps()) if step not in tried]
      if not fresh:
        return
      for step in fresh:
        tried.add(step)
        yield step
      self._reload()

  def _forget_deleted(self, damaged: dict[int, str]):
    """What the run that is read has deleted meanwhile was not damaged."""
    if self._cfg is None:
      there = set(self.steps())
      for step in [step for step in damaged if step not in there]:
        del damaged[step]

  def _require_no_remains(self):
    """Refuses to start anew where checkpoints were, and none but those moved aside are left."""
    found = sorted(path.name for path in self._directory.glob('*.*-[0-9]*'))
    found = [name for name in found if _MOVED_ASIDE.fullmatch(name)]
    errors.require(
      not found,
      f'{self._directory} holds no checkpoint but those moved aside, {", ".join(found)}; rename '
      'one of them to its number to go on from it, or start again in another --workdir (or move '
      'this directory away)',
    )

  def _read_record(self, step: int) -> dict[str, Any]:
    """Reads the JSON item of a step and checks that nothing of the step's metadata is missing."""
    path = self._directory / str(step)
    if not path.is_dir():
      link = os.path.islink(path)
      raise _DamagedError('it is a link to what is not there' if link else 'it is no directory')
    try:
      metadata = self._reader.metadata(self._directory / str(step))
      item = ocp.args.Composite(meta=ocp.args.JsonRestore())
      json_item = self._reader.restore(self._directory / str(step), args=item).meta
    except Exception as e:
      raise _DamagedError(f'its meta cannot be read: {_first_line(e)}') from e
    if not isinstance(json_item, dict) or json_item.pop('crc32', None) != integrity.crc(json_item):
      raise _DamagedError('its meta does not match its own checksum')
    if json_item['step'] != step:
      raise _DamagedError(f'it holds step {json_item["step"]}')
    if metadata.commit_timestamp_nsecs is None:
      raise _DamagedError('its _CHECKPOINT_METADATA is missing or unreadable')
    if (metadata.item_metadata or {}).get('state') is None:
      raise _DamagedError('its state/_METADATA or what it points to is missing')
    return json_item

  def _restore_whole(
    self,
    step: int,
    abstract_state: trees.Tree | Callable[[dict[str, Any]], trees.Tree],
    partial: bool,
  ) -> Restored:
    state, reason = None, 'another process could not read it'
    try:
      saved = self._read_record(step)
      made = abstract_state(saved['meta']) if callable(abstract_state) else abstract_state
      target = jax.tree.map(_with_sharding, made)
      shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
      arrays = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target, shardings),
        partial_restore=partial,
      )
      items = ocp.args.Composite(state=arrays)
      integrity.check_leaves(saved['leaves'], target, self._directory / str(step), partial)
      state = self._reader.restore(self._directory / str(step), args=items).state
    except errors.InputError:
      raise
    except _DamagedError as e:
      reason = str(e)
    except Exception as e:  # orbax and tensorstore raise many kinds for the same broken file
      reason = f'its arrays cannot be read: {_first_line(e)}'
    if not _on_all_processes(state is not None):
      raise _DamagedError(reason)
    actual = integrity.checksums(state)
    wrong = [name for name in actual if saved['leaves'][name]['checksum'] != actual[name]]
    if wrong:
      raise _DamagedError(
        f'{len(wrong)} of {len(actual)} arrays differ from their checksums, first {wrong[0]}'
      )
    return Restored(state, saved['meta'], step)

  def _settle(self, step: int, damaged: Mapping[int, str]):
    """Says which steps are damaged; a writer moves everything newer than `step` aside."""
    self._may_save = True
    newer = [s for s in self.steps() if s > step] if self._cfg is not None else []
    moved = {s: self._free_name(s, 'damaged' if s in damaged else 'superseded') for s in newer}
    self._tell_damaged(damaged, step, moved)
    if not newer:
      return
    _on_all_processes(True)  # everyone has chosen its names before the first one changes
    if jax.process_index() == 0 or self._parts is not None:
      for old, name in moved.items():
        (self._directory / str(old)).rename(name)
    _on_all_processes(True)
    self._manager.reload()

  def _tell_damaged(
    self, damaged: Mapping[int, str], step: int, moved: Mapping[int, epath.Path] | None = None
  ):
    for old, reason in damaged.items():
      kept = f' (kept as {moved[old].name})' if moved and old in moved else ''
      where = f'Checkpoint step {old} in {self._directory}'
      logging.warning(f'{where} is damaged: {reason}{kept}. Using step {step} in its place.')

  def _free_name(self, step: int, label: str) -> epath.Path:
    return atomic_files.free_name(lambda k: self._directory / f'{step}.{label}-{k}')

  def _require_step(self, step: int):
    if step not in self.steps():
      raise errors.InputError(
        f'step={step} is not among the checkpoints in {self._directory}; {_available(self.steps())}'
      )

  def _none_whole(self, damaged: Mapping[int, str]) -> str:
    there = self.steps()
    gone = 'it was deleted while it was read'
    found = {step: reason if step in there else gone for step, reason in damaged.items()}
    reasons = '; '.join(f'step {step}: {reason}' for step, reason in found.items())
    others = [step for step in there if step not in damaged]
    if others:
      return f'Checkpoint in {self._directory} is damaged ({reasons}); {_available(others)}'
    return (
      f'No checkpoint in {self._directory} is whole ({reasons}). Nothing was changed: repair one '
      'of them, or start again in another --workdir (or move this directory away)'
    )


def _options(
  writer: schema.CheckpointConfig | None, parts: parts_lib.Parts | None
) -> ocp.CheckpointManagerOptions:
  """What orbax shall keep, make and clear away."""
  return ocp.CheckpointManagerOptions(
    max_to_keep=writer.keep_last if writer else None,
    keep_period=(writer.keep_every or None) if writer else None,
    create=writer is not None,
    # What a killed run left half-written was never a checkpoint, and would fill the disk.
    cleanup_tmp_directories=writer is not None,
    async_options=ocp.AsyncOptions(timeout_secs=parts_handler.TIMEOUT) if parts else None,
  )


def _handlers(parts: parts_lib.Parts | None) -> ocp.handlers.CheckpointHandlerRegistry | None:
  """What writes and reads the items of a step where it comes in parts; None for orbax's own."""
  if parts is None:
    return None
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add('state', ocp.args.StandardSave, parts_handler.PartsHandler(parts))
  registry.add('meta', ocp.args.JsonSave, ocp.JsonCheckpointHandler())
  return registry


def _reader() -> ocp.Checkpointer:
  """Reads steps without waiting for the other processes.

  A manager's restore ends in a barrier. When one process alone cannot read its part, the others
  would wait there for ever instead of hearing of it in `_on_all_processes`.
  """
  index = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=index, active_processes={index}, barrier_sync_key_prefix=f'reader{index}'
  )
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
    meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
  )
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _save_args(leaf: jax.Array) -> ocp.SaveArgs:
  """Cuts a large array into its layers and experts, then into blocks; orbax would write it whole.

  Orbax cuts the longest axis into divisors of its length. One with few of them (a vocabulary of
  50257 is prime) would end in single rows, so it is left whole.
  """
  if leaf.nbytes <= MAX_CHUNK_BYTES:
    return ocp.SaveArgs()
  below = [math.prod(leaf.shape[axis + 1 :]) * leaf.dtype.itemsize for axis in range(leaf.ndim - 2)]
  stacked = tuple(axis for axis, num_bytes in enumerate(below) if num_bytes >= MIN_CHUNK_BYTES)
  divides = max(leaf.shape[len(stacked) :]) % 64 == 0
  return ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES if divides else None, shard_axes=stacked)


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:  # orbax would look for the devices of the run that saved
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _available(steps: list[int]) -> str:
  if not steps:
    return 'there are none'
  return f'choose one of {", ".join(map(str, steps))}, or leave the step out for the newest'


def _first_line(e: BaseException) -> str:
  while e.__cause__ is not None:  # the first cause names the file, the wrappers print their request
    e = e.__cause__
  text = (str(e).strip().splitlines() or [''])[0]
  return f'{type(e).__name__}: {text[:200]}'


def _on_all_processes(ok: bool) -> bool:
  """Whether `ok` holds on every process; a barrier, so that all take the same branch."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.array(ok)).all())
