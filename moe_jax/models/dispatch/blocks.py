"""Experts on a CPU, one after the other: every product of an expert while its rows are in cache.

XLA's grouped products are dense on a CPU, so this is a loop over experts. What it saves against one
loop per product over blocks of equal height (experiments/bench has the figures):

* An expert's weights are cut out of the stack once. A product packs them anew, so an expert's rows
  go into one block if they can: its height is the smallest of a ladder that holds them.
* Rows of x and of the cotangent are gathered into the block, results are added to the tokens' sums
  as they come: nothing of size R D stands in memory, whose pages a process would touch for the
  first time in every step. The loop adds in the order of experts, so sums are the same every time.

Legend: T tokens, K choices per token, E experts, R rows of the plan, D, F, G = 2 F.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import layers
from moe_jax.models.dispatch import plan as plan_lib

Array = jax.Array

LOWEST, TALLEST = 32, 512  # heights of a block


class _Rows(NamedTuple):
  """What the loop asks of a row."""

  token: Array  # [R] int32, T where no choice sits
  gate: Array  # [R] float32, 0 where no choice sits


def ladder(num_choices: int, num_experts: int) -> tuple[int, ...]:
  """Heights of blocks, ascending: powers of two, and some about the mean rows of an expert."""
  mean = num_choices / num_experts
  heights = {LOWEST << i for i in range((TALLEST // LOWEST).bit_length())}
  heights |= {-int(-mean * more // LOWEST) * LOWEST for more in (1.0, 1.125, 1.25)}
  lowest_enough = min((h for h in heights if h >= num_choices), default=TALLEST)
  return tuple(sorted(h for h in heights if h <= min(lowest_enough, TALLEST)))


def _rows(gates: Array, plan: plan_lib.Plan, height: int) -> _Rows:
  """Of all rows, and of as many behind them as a block may reach."""
  choice = jnp.pad(plan.row_choice, (0, height), constant_values=gates.size)
  return _Rows(choice // gates.shape[1], plan_lib.take(gates.reshape(-1), choice))


def _cut(tree: Any, start: Array, height: int) -> Any:
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, height), tree)


def _own(rows: _Rows, first: Array, height: int, end: Array, num_tokens: int) -> _Rows:
  """The rows of a block; those from `end` on are the next experts', here they are padding."""
  token, gate = _cut(rows, first, height)
  own = first + jnp.arange(height, dtype=jnp.int32) < end
  return _Rows(jnp.where(own, token, num_tokens), jnp.where(own, gate, 0))


def _put(whole: Array, part: Array, start: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, 0)


def _added(sums: Array, own: _Rows, part: Array) -> Array:
  """Sums [T, D] float32 of tokens with the rows of a block added to them."""
  return sums.at[own.token].add(part.astype(jnp.float32), mode='drop')


def _for_each_block(
  heights: tuple[int, ...], start: Array, size: Array, body: Callable, carry: Any
) -> Any:
  """Runs body(height, first row, carry): tallest blocks, then one that holds the rest."""
  *lower, tallest = heights
  least = lower[-1] if lower else 0  # what needs no tall block
  tall = jnp.maximum(size - least + tallest - 1, 0) // tallest
  carry = jax.lax.fori_loop(0, tall, lambda i, c: body(tallest, start + i * tallest, c), carry)
  start, rest = start + tall * tallest, size - tall * tallest
  for below, height in zip((0, *lower), lower):
    here = (rest > below) & (rest <= height)
    # Were nothing here to depend on i, XLA would move the products out of the loop, and run all.
    once = lambda i, c, height=height: body(height, start + i * height, c)
    carry = jax.lax.fori_loop(0, here.astype(jnp.int32), once, carry)
  return carry


def _for_each_expert(plan: plan_lib.Plan, body: Callable, carry: Any) -> Any:
  """Runs body(expert, first row, rows, carry) over the experts that have rows, in their order."""
  sizes = plan.group_sizes
  start = jnp.cumsum(sizes) - sizes
  busy = jnp.argsort(sizes == 0, stable=True)  # those first

  def step(i: Array, carry: Any) -> Any:
    expert = busy[i]
    return body(expert, start[expert], sizes[expert], carry)

  return jax.lax.fori_loop(0, (sizes > 0).sum(), step, carry)


def forward(
  keep: bool, x: Array, gates: Array, w13: Array, w2: Array, plan: plan_lib.Plan
) -> tuple[Array, Array | None]:
  """The gated sum of each token's experts, and what the backward pass needs.

  Args:
    keep: whether there will be a backward pass.
    x: [T, D].
    gates: [T, K] float32.
    w13: [E, D, G], gate before up.
    w2: [E, F, D].
    plan: its groups hold no rows but those of their choices.

  Returns:
    ([T, D]; the pre-activation h of all rows and some behind them, if it is to be kept).
  """
  heights = ladder(gates.size, len(w13))
  rows = _rows(gates, plan, heights[-1])

  def expert(e: Array, start: Array, size: Array, carry: tuple[Array, ...]):
    up, down = w13[e], w2[e]

    def block(height: int, first: Array, carry: tuple[Array, ...]):
      own = _own(rows, first, height, start + size, len(x))
      with jax.named_scope('w13'):
        h = plan_lib.take(x, own.token) @ up
      with jax.named_scope('swiglu'):
        pair = h.reshape(height, 2, -1).astype(jnp.float32)
        a = (layers.swiglu(pair) * own.gate[:, None]).astype(x.dtype)
      with jax.named_scope('w2'):
        y = a @ down
      with jax.named_scope('combine'):
        sums = _added(carry[0], own, y)
      # What stands behind the expert's rows the next one overwrites.
      return (sums, _put(carry[1], h, first)) if keep else (sums,)

    return _for_each_block(heights, start, size, block, carry)

  carry = (jnp.zeros(x.shape, jnp.float32),)
  if keep:
    carry += (jnp.zeros((len(rows.token), w13.shape[2]), x.dtype),)
  sums, *h = _for_each_expert(plan, expert, carry)
  return sums.astype(x.dtype), checkpoint_name(h[0], 'moe_h') if keep else None


def backward(
  x: Array, gates: Array, w13: Array, w2: Array, plan: plan_lib.Plan, h: Array, d_out: Array
) -> tuple[Array, Array, Array, Array]:
  """Gradients of x, gates, w13 and w2; arguments as `forward` has and gives them, d_out [T, D]."""
  heights = ladder(gates.size, len(w13))
  rows = _rows(gates, plan, heights[-1])
  product = lambda form, a, b: jnp.einsum(form, a, b, preferred_element_type=jnp.float32)

  def expert(e: Array, start: Array, size: Array, carry: tuple[Array, ...]):
    up, down = w13[e], w2[e]

    def block(height: int, first: Array, carry: tuple[Array, ...]):
      d_x, d_gate, d_up, d_down = carry
      own = _own(rows, first, height, start + size, len(x))
      d_rows = plan_lib.take(d_out, own.token)
      with jax.named_scope('w2'):
        d_act = jnp.einsum('RD,FD->RF', d_rows, down).astype(jnp.float32)
      with jax.named_scope('swiglu'):
        # Rows behind the expert's are another's, and were drawn with other weights.
        pair = jnp.where((own.token < len(x))[:, None], _cut(h, first, height), 0)
        pair = pair.reshape(height, 2, -1).astype(jnp.float32)
        act, swiglu_vjp = jax.vjp(layers.swiglu, pair)
        d_gate = _put(d_gate, (d_act * act).sum(axis=-1), first)
        (d_pair,) = swiglu_vjp(d_act * own.gate[:, None])
        d_h = d_pair.reshape(height, -1).astype(x.dtype)
        gated = (act * own.gate[:, None]).astype(x.dtype)
      with jax.named_scope('w2'):
        d_down += product('RF,RD->FD', gated, d_rows)
      with jax.named_scope('w13'):
        d_up += product('RD,RG->DG', plan_lib.take(x, own.token), d_h)
        d_x_rows = jnp.einsum('RG,DG->RD', d_h, up)
      with jax.named_scope('combine'):
        d_x = _added(d_x, own, d_x_rows)
      return d_x, d_gate, d_up, d_down

    d_x, d_gate, d_w13, d_w2 = carry
    sums = jnp.zeros(up.shape, jnp.float32), jnp.zeros(down.shape, jnp.float32)
    carry = (d_x, d_gate, *sums)
    d_x, d_gate, d_up, d_down = _for_each_block(heights, start, size, block, carry)
    return d_x, d_gate, _put(d_w13, d_up[None], e), _put(d_w2, d_down[None], e)

  by_token = jnp.zeros(x.shape, jnp.float32), jnp.zeros(len(rows.token), jnp.float32)
  carry = (*by_token, jnp.zeros_like(w13), jnp.zeros_like(w2))
  d_x, d_gate, d_w13, d_w2 = _for_each_expert(plan, expert, carry)
  return d_x.astype(x.dtype), plan_lib.take(d_gate, plan.choice_row), d_w13, d_w2
