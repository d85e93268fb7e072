"""What a backend of the experts gets and returns: its operands, its gradients, its interface."""

from typing import ClassVar, NamedTuple, Protocol

import jax

from moe_jax.models.experts import sorted_plan

Array = jax.Array


class Operands(NamedTuple):
  """The arrays that all experts of a layer are computed from."""

  x: Array  # [T, D]
  gates: Array  # [T, K] float32
  gate_up: Array  # [E, D, 2 F], gate before up
  down: Array  # [E, F, D]
  plan: sorted_plan.Plan  # the row of each choice


class Gradients(NamedTuple):
  """Gradients of the operands, of the same shapes."""

  x: Array
  gates: Array
  gate_up: Array
  down: Array


class ExpertBackend(Protocol):
  """Forward and backward pass of all experts over a sorted plan."""

  @property
  def name(self) -> str:
    """The backend's name, as a run prints it."""
    ...

  # Whether the plan's groups must cover all rows, because a kernel writes no others.
  covers: ClassVar[bool]

  def forward(self, operands: Operands, *, keep: bool, limited: bool) -> tuple[Array, Array | None]:
    """The gated sum of each token's experts.

    Args:
      operands: see `Operands`.
      keep: whether there will be a backward pass.
      limited: whether the plan has rows behind its groups.

    Returns:
      ([T, D]; if it is to be kept, the pre-activation h [rows, 2 F], maybe with rows behind).
    """
    ...

  def backward(self, operands: Operands, h: Array, d_out: Array, *, limited: bool) -> Gradients:
    """The gradients, from h as `forward` returned it and the cotangent d_out [T, D]."""
    ...
