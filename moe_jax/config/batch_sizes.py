"""How many rows each step of a run takes, and how many all earlier ones took."""

from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.config import schema


class BatchSizes(NamedTuple):
  """The global batch size by step; its sums take no longer for a long run than for a short one."""

  batch_size: int  # after the ramp
  ramp: Sequence[tuple[int, int]] = ()  # (until step, size), the steps rising

  def at(self, step: int) -> int:
    """Rows in the batch of `step`: the ramp entry still in force, or `batch_size`."""
    return next((size for until, size in self.ramp if step < until), self.batch_size)

  def before(self, step: int) -> int:
    """Rows in the batches of the steps 0, ..., step - 1."""
    edges = [0, *(until for until, _ in self.ramp if until < step), step]
    return sum((b - a) * self.at(a) for a, b in zip(edges, edges[1:]))

  def used(self, num_steps: int) -> set[int]:
    """The sizes that the first `num_steps` steps have."""
    begins = [0, *(until for until, _ in self.ramp)]
    return {self.at(begin) for begin in begins if begin < num_steps}


def of(train: schema.TrainConfig) -> BatchSizes:
  """The batch sizes of a run."""
  return BatchSizes(train.batch_size, train.batch_ramp)
