"""Logits processors: pure functions that change logits between the model and the draw of a token.

They are applied in order behind the repetition penalty and before temperature and filters, inside
the compiled loop; so whatever they add to logits is divided by the temperature. A processor
belongs to a batch: its constants may hold something for each row. Speculative decoding takes none.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees

Array = jax.Array


class Written(NamedTuple):
  """The tokens of every row so far, behind its prompt."""

  ids: Array  # [B, slots] int32; -1 in slots from `count` on, and where a row has ended
  count: Array  # [] int32, tokens drawn; the next one is for slot `count`


# (constants, logits [B, V] float32, written, state) -> (logits [B, V], state). A processor of a row
# must not read other rows, and an ended row's result is never used.
Function = Callable[[trees.Tree, Array, Written, trees.Tree], tuple[Array, trees.Tree]]


class Processor(NamedTuple):
  """A function with what it reads and what it carries from token to token."""

  function: Function  # hashable, and equal for equal computations: what it is compiled by
  constants: Any = ()  # arrays; never copied in the loop
  state: Any = ()  # arrays before the first token


def apply(
  functions: Sequence[Function],
  constants: Sequence[trees.Tree],
  logits: Array,
  written: Written,
  states: Sequence[trees.Tree],
) -> tuple[Array, tuple[trees.Tree, ...]]:
  """Applies processors one behind the other.

  Args:
    functions: of the processors.
    constants: of each.
    logits: [B, V] float32.
    written: see `Written`.
    states: of each.

  Returns:
    (logits [B, V], states after this token).
  """
  after = []
  for function, known, state in zip(functions, constants, states, strict=True):
    logits, state = function(known, logits, written, state)
    after.append(state)
  return logits, tuple(after)


def forbid_before(count: int, ids: Sequence[int]) -> Processor:
  """A processor under which no row draws one of `ids` as one of its first `count` tokens."""
  return Processor(_forbid, (jnp.int32(count), jnp.array(tuple(ids), jnp.int32)))


def _forbid(
  constants: tuple[Array, Array], logits: Array, written: Written, state: trees.Tree
) -> tuple[Array, trees.Tree]:
  until, ids = constants
  forbidden = logits.at[:, ids].set(-jnp.inf)
  return jnp.where(written.count < until, forbidden, logits), state
