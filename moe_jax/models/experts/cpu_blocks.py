"""Experts on a CPU, block by block: every product of an expert while its rows are in cache.

XLA's grouped products are dense on a CPU, so these are loops over blocks of rows. What they save
against one loop per product over blocks of equal height (experiments/bench has the figures):

* A block cuts its expert's weights out of the stack, and every product packs them anew: so an
  expert's rows go into one block if they can. Its height is the smallest of a ladder that holds it.
* Rows of x and of the cotangent are gathered into the block, results are added to the tokens' sums
  as they come: nothing of size rows x D stands in memory, whose pages a process would touch for the
  first time in every step. The loops add in an order that the plan decides, so that sums are the
  same every time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.models import layers
from moe_jax.models.experts import expert_backend, low_precision, sorted_plan

Array = jax.Array

LOWEST, TALLEST = 32, 512  # heights of a block


class _Rows(NamedTuple):
  """What the loop asks of a row."""

  token: Array  # [rows] int32, T where no choice sits
  gate: Array  # [rows] float32, 0 where no choice sits


def ladder(num_choices: int, num_experts: int) -> tuple[int, ...]:
  """Heights of blocks, ascending: powers of two, and some about the mean rows of an expert."""
  mean = num_choices / num_experts
  heights = {LOWEST << i for i in range((TALLEST // LOWEST).bit_length())}
  heights |= {-int(-mean * more // LOWEST) * LOWEST for more in (1.0, 1.125, 1.25)}
  lowest_enough = min((h for h in heights if h >= num_choices), default=TALLEST)
  return tuple(sorted(h for h in heights if h <= min(lowest_enough, TALLEST)))


def _rows(gates: Array, plan: sorted_plan.Plan, height: int) -> _Rows:
  """Of all rows, and of as many behind them as a block may reach."""
  choice = jnp.pad(plan.row_choice, (0, height), constant_values=gates.size)
  return _Rows(choice // gates.shape[1], sorted_plan.take(gates.reshape(-1), choice))


def _cut(tree: trees.Tree, start: Array, height: int) -> Any:
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, height), tree)


def _own(rows: _Rows, first: Array, height: int, end: Array, num_tokens: int) -> _Rows:
  """The rows of a block; those from `end` on are other experts' and get no token here.

  Their gates and pre-activations need no mask: rows without a token are zeros in x and in the
  cotangent, and what they give is dropped. (A mask of integers would be computed anew for every
  number that it is fused with.)
  """
  token, gate = _cut(rows, first, height)
  own = first + jnp.arange(height, dtype=jnp.int32) < end
  return _Rows(jnp.where(own, token, num_tokens), gate)


def _put(whole: Array, part: Array, start: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, 0)


def _put_rows(whole: Array, part: Array, first: Array, end: Array) -> Array:
  """`whole` with a block's rows before `end`; the others keep what their own experts wrote."""
  own = first + jnp.arange(len(part), dtype=jnp.int32) < end
  own = own.reshape(-1, *[1] * (part.ndim - 1))
  return _put(whole, jnp.where(own, part.astype(whole.dtype), _cut(whole, first, len(part))), first)


def _added(sums: Array, own: _Rows, part: Array) -> Array:
  """Sums [T, D] float32 of tokens with the rows of a block added to them."""
  return sums.at[own.token].add(part.astype(jnp.float32), mode='drop')


def _for_each_block(
  heights: tuple[int, ...], plan: sorted_plan.Plan, body: Callable, carry: trees.Tree
) -> Any:
  """Runs body(height, expert, first row, end of the expert's rows, carry), tallest blocks first.

  An expert's rows are tallest blocks, and one that holds the rest. One loop per height, over the
  blocks that have it: a loop costs some microseconds even where it has nothing to do, and XLA would
  copy what passes through a conditional.
  """
  *lower, tallest = heights
  sizes = plan.group_sizes
  end = jnp.cumsum(sizes)
  most = lower[-1] if lower else 0  # what needs no tallest block
  tall = jnp.maximum(sizes - most + tallest - 1, 0) // tallest
  rest = sizes - tall * tallest
  # Blocks of each height per expert, and the rows that they follow.
  blocks = [(tallest, tall, jnp.zeros_like(tall))]
  for below, height in zip((0, *lower), lower):
    holds = (rest > below) & (rest <= height)
    blocks.append((height, holds.astype(jnp.int32), tall * tallest))
  for height, count, after in blocks:
    count_end = jnp.cumsum(count)

    def block(
      i: Array, carry: trees.Tree, height=height, count=count, after=after, count_end=count_end
    ) -> Any:
      e = jnp.searchsorted(count_end, i, side='right', method='compare_all')
      number = i - count_end[e] + count[e]  # among the expert's blocks of this height
      first = end[e] - sizes[e] + after[e] + number * height
      return body(height, e, first, end[e], carry)

    carry = jax.lax.fori_loop(0, count_end[-1], block, carry)
  return carry


def _product(form: str, a: Array, b: Array) -> Array:
  return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _add_to_expert(whole: Array, part: Array, e: Array) -> Array:
  """Gradients [E, ...] of a weight with those of a block of expert e added."""
  return _put(whole, _cut(whole, e, 1) + part[None], e)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockExperts:
  """`expert_backend.ExpertBackend` by loops over blocks of an expert's rows.

  The loops visit no row behind the last group, so `limited` makes no difference to them.
  """

  name: str = 'blocks'
  rounding: low_precision.Rounding = low_precision.NONE  # of what the products see
  covers: ClassVar[bool] = False  # groups hold no rows but those of their choices

  def forward(
    self, operands: expert_backend.Operands, *, keep: bool, limited: bool
  ) -> tuple[Array, Array | None]:
    """As `ExpertBackend.forward`; h has some rows behind those of the plan."""
    del limited
    x, gates, gate_up, down, plan = operands
    heights = ladder(gates.size, len(gate_up))
    rows = _rows(gates, plan, heights[-1])
    gate_up, down = self.rounding.weights(gate_up), self.rounding.weights(down)

    def block(height: int, e: Array, first: Array, end: Array, carry: tuple[Array, ...]):
      own = _own(rows, first, height, end, len(x))
      with jax.named_scope('gather'):
        x_rows = self.rounding.rows(sorted_plan.take(x, own.token))
      with jax.named_scope('gate_up'):
        h = x_rows @ gate_up[e]
      with jax.named_scope('swiglu'):
        pair = h.reshape(height, 2, -1).astype(jnp.float32)
        a = self.rounding.rows((layers.swiglu(pair) * own.gate[:, None]).astype(x.dtype))
      with jax.named_scope('down'):
        y = a @ down[e]
      with jax.named_scope('combine'):
        sums = _added(carry[0], own, y)
      return (sums, _put_rows(carry[1], h, first, end)) if keep else (sums,)

    carry = (jnp.zeros(x.shape, jnp.float32),)
    if keep:
      carry += (jnp.zeros((len(rows.token), gate_up.shape[2]), x.dtype),)
    sums, *h = _for_each_block(heights, plan, block, carry)
    return sums.astype(x.dtype), h[0] if keep else None

  def backward(
    self, operands: expert_backend.Operands, h: Array, d_out: Array, *, limited: bool
  ) -> expert_backend.Gradients:
    """As `ExpertBackend.backward`."""
    del limited
    x, gates, gate_up, down, plan = operands
    heights = ladder(gates.size, len(gate_up))
    rows = _rows(gates, plan, heights[-1])
    gate_up, down = self.rounding.weights(gate_up), self.rounding.weights(down)

    def block(height: int, e: Array, first: Array, end: Array, carry: tuple[Array, ...]):
      d_x, d_gate, d_gate_up, d_down = carry
      own = _own(rows, first, height, end, len(x))
      with jax.named_scope('gather'):
        x_rows = self.rounding.rows(sorted_plan.take(x, own.token))
        d_rows = sorted_plan.take(d_out, own.token)
      with jax.named_scope('down'):
        d_act = jnp.einsum('TD,FD->TF', d_rows, down[e]).astype(jnp.float32)
      with jax.named_scope('swiglu'):
        pair = _cut(h, first, height).reshape(height, 2, -1).astype(jnp.float32)
        act, swiglu_vjp = jax.vjp(layers.swiglu, pair)
        d_gate = _put_rows(d_gate, (d_act * act).sum(axis=-1), first, end)
        (d_pair,) = swiglu_vjp(d_act * own.gate[:, None])
        d_h = d_pair.reshape(height, -1).astype(x.dtype)
        gated = self.rounding.rows((act * own.gate[:, None]).astype(x.dtype))
      with jax.named_scope('down'):
        d_down = _add_to_expert(d_down, _product('TF,TD->FD', gated, d_rows), e)
      with jax.named_scope('gate_up'):
        d_gate_up = _add_to_expert(d_gate_up, _product('TD,TO->DO', x_rows, d_h), e)
        d_x_rows = jnp.einsum('TO,DO->TD', d_h, gate_up[e])
      with jax.named_scope('combine'):
        d_x = _added(d_x, own, d_x_rows)
      return d_x, d_gate, d_gate_up, d_down

    shapes = x.shape, rows.gate.shape, gate_up.shape, down.shape
    carry = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    d_x, d_gate, d_gate_up, d_down = _for_each_block(heights, plan, block, carry)
    d_gates = sorted_plan.take(d_gate, plan.choice_row)
    return expert_backend.Gradients(
      d_x.astype(x.dtype), d_gates, d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype)
    )
