"""How orbax writes one step on the disks of several machines.

Every process writes its arrays to `state/ocdbt.process_K`, and process 0 merges those folders when
all are written, by references, so they must lie there. On a common disk they do; here each process
hands its own over as soon as it is written, and process 0 collects them before the merge. So only
process 0 has whole steps, and the others keep none.
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future as orbax_future

from moe_jax.storage import parts as parts_lib

TIMEOUT = 6 * 3600  # seconds that a save may take; a process that has gone is noticed elsewhere


class PartsHandler(ocp.StandardCheckpointHandler):
  """Saves a pytree, its parts from several disks.

  Args:
    parts: carries them to process 0.
  """

  def __init__(self, parts: parts_lib.Parts):
    super().__init__()
    self._parts = parts

  @classmethod
  def typestr(cls) -> str:
    """The name in the step, which any reader of orbax's knows."""
    return ocp.StandardCheckpointHandler.typestr()

  async def async_save(
    self, directory: epath.Path, *args: Any, **kwargs: Any
  ) -> list[orbax_future.Future] | None:
    """Starts writing this process's part; the futures end when it is with process 0."""
    if self._parts.process:  # orbax waits for process 0 to make it
      (directory / 'array_metadatas').mkdir(parents=True, exist_ok=True)
    written = await super().async_save(directory, *args, **kwargs)
    if not self._parts.process:
      return written
    return [_Given(written or [], self._parts, directory)]

  def finalize(self, directory: epath.Path):
    """Merges the parts; process 0 alone is called, when all have given theirs."""
    self._parts.collect(_step(directory), pathlib.Path(directory))
    super().finalize(directory)


class _Given:
  """Ends when a part is written and handed over."""

  def __init__(
    self,
    written: Sequence[orbax_future.Future],
    parts: parts_lib.Parts,
    directory: epath.Path,
  ):
    self._directory, self._parts = directory, parts
    self._all = orbax_future.ChainedFuture(written, self._give)

  def result(self, timeout: float | None = None):
    """Waits until process 0 can have it."""
    self._all.result(timeout)

  def cancel(self):
    """Gives up what is not written yet."""
    self._all.cancel()

  def _give(self):
    self._parts.give(_step(self._directory), pathlib.Path(self._directory))
    for made in self._directory.parents[1].iterdir():  # of this save, and those it started from
      shutil.rmtree(made, ignore_errors=True)


def _step(directory: epath.Path) -> int:
  """8, of 'checkpoints/8.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp'."""
  return int(directory.parent.name.partition('.')[0])
