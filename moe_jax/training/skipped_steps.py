"""Steps that are not applied because their loss or gradient is not finite, and how many there were.

A skipped step leaves parameters, moments and router state as they were, bit by bit; `step` goes on,
so that the batch of a step stays a pure function of its number. Nothing is added to the state for
it: Adam counts the updates that its moments have seen, and the schedule's count is set to the step
before each update, so what lacks between these counts and `step` are the steps that were skipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import trees

Array = jax.Array


class Skipped(NamedTuple):
  """How many of the steps so far were skipped, [] int32 each."""

  total: Array
  in_row: Array  # those since the last step that was applied


def count(opt_state: trees.Tree, step: Array) -> Skipped:
  """What was skipped of the `step` steps before a state.

  Args:
    opt_state: of `optim.optimizer`.
    step: [] int32, steps done.
  """
  counts = {
    type(node): node.count
    for node in jax.tree.leaves(opt_state, is_leaf=_is_counted)
    if _is_counted(node)
  }
  total, in_row = counts[optax.ScaleByAdamState], counts[optax.ScaleByScheduleState]
  return Skipped(step - total, step - in_row)


def at_step(opt_state: trees.Tree, step: Array) -> Any:
  """The optimizer's state with its place in the learning-rate schedule set to `step`."""

  def placed(node):
    return node._replace(count=step) if isinstance(node, optax.ScaleByScheduleState) else node

  return jax.tree.map(placed, opt_state, is_leaf=_is_counted)


def is_applied(loss: Array, norm: Array, skipped: Skipped, most: int) -> Array:
  """Whether a step is applied, [] bool.

  Once more than `most` steps in a row were skipped none is applied any more, so that the state is
  still that of the first of them when the host, which reads metrics a few steps late, stops.

  Args:
    loss: [] float32, sum of all losses of the step.
    norm: [] float32, global gradient norm.
    skipped: before this step.
    most: `train.max_skipped_steps`.
  """
  return jnp.isfinite(loss) & jnp.isfinite(norm) & (skipped.in_row <= most)


def select(applied: Array, new: trees.Tree, old: trees.Tree) -> Any:
  """`new` where the step is applied, else `old`; elementwise, in the loop that computes `new`."""
  return jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)


def _is_counted(node: Any) -> bool:
  return isinstance(node, (optax.ScaleByAdamState, optax.ScaleByScheduleState))
