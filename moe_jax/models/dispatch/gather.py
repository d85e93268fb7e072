"""Dispatch for few tokens, as in decoding: reads the weights of the chosen experts and no others.

`dropless` pads every expert in use to a block of rows; with a token or a few per expert nearly all
of that is waste. `dispatch` gathers the weights of the chosen experts, which moves their bytes
three times: read, written, read.

A CPU feels that, so `apply` copies nothing while choices are few (A <= 2 E). XLA has no matrix
product whose operand is picked at run time; but a sum of picked elements is one fused loop over
memory: the input axis is cut into J pieces of LANES, and J terms are added lane by lane. Beyond, it
takes the rows sorted by expert, in blocks about as high as an expert has rows. Both want the input
axis of a weight last, so that it is read in order: `lay_out` brings the kernels there once, before
decoding (experiments/bench has the figures).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.models import layers
from moe_jax.models.experts import sorted_plan

Array = jax.Array

LANES = 16  # at least; the floats of a vector register, and a few times that for wide inputs
MAX_TERMS = 32  # J at most: terms of a sum are unrolled, and compiled one by one
STREAMED_CHOICES = 2  # choices per expert up to which nothing is copied
BLOCKS = (8, 16, 64)  # rows of a block


class Kernels(NamedTuple):
  """Expert weights with the input axis last."""

  gate_up: Array  # [E, 2, F, D]
  down: Array  # [E, D, F]


def lay_out(gate_up: Array, down: Array) -> Kernels:
  """gate_up [..., E, D, 2, F] and down [..., E, F, D] -> Kernels; copies both."""
  return Kernels(jnp.moveaxis(gate_up, -3, -1), jnp.swapaxes(down, -1, -2))


def dispatch(
  x: Array,
  gates: Array,
  expert_idx: Array,
  gate_up: Array,
  down: Array,
  backend: str,
  room: int,
) -> Array:
  """Sum over each token's K experts of gate * expert(x); arguments as in `dropless.dispatch`.

  `backend` names a grouped product, `room` the size of a buffer; this dispatch has neither. It
  needs T K times the memory of an expert.
  """
  del backend, room
  routed = (expert_idx < len(gate_up))[..., None]
  expert = jnp.minimum(expert_idx, len(gate_up) - 1)
  # Before the product too: its gradient would be the token's NaN times 0.
  x = jnp.where(routed.any(axis=1), x, 0)
  with jax.named_scope('gate_up'):
    h = jnp.einsum('TD,TKDGF->TKGF', x, gate_up[expert]).astype(jnp.float32)
  with jax.named_scope('swiglu'):
    a = (layers.swiglu(h) * gates[..., None]).astype(x.dtype)
  with jax.named_scope('down'):
    y = jnp.einsum('TKF,TKFD->TKD', a, down[expert])
  with jax.named_scope('combine'):
    # Where, not times 0: what a token that is not routed holds must reach nobody, a NaN included.
    return jnp.where(routed, y, 0).sum(axis=1, dtype=jnp.float32).astype(x.dtype)


def apply(x: Array, gates: Array, expert_idx: Array, kernels: Kernels) -> Array:
  """Sum over each token's K experts of gate * expert(x).

  Args:
    x: [T, D].
    gates: [T, K] float32.
    expert_idx: [T, K] int32; E = not routed, contributes nothing.
    kernels: see `lay_out`.

  Returns:
    [T, D] in the dtype of x.
  """
  streamed = expert_idx.size <= STREAMED_CHOICES * len(kernels.gate_up)
  return (_streamed if streamed else _blocks)(x, gates, expert_idx, kernels)


def _streamed(x: Array, gates: Array, expert_idx: Array, kernels: Kernels) -> Array:
  """One row per choice, its weights read where they are."""
  (num_tokens, d), k = x.shape, gates.shape[1]
  num_experts, _, f, _ = kernels.gate_up.shape
  flat, gate = expert_idx.reshape(-1), gates.reshape(-1)
  if num_tokens == 1:
    rows, chosen = x[jnp.zeros_like(flat)], flat
  else:
    # Choices of one expert follow each other: its weights come from memory once.
    choice = jnp.arange(flat.size, dtype=jnp.int32)
    chosen, order = jax.lax.sort((flat, choice), num_keys=1)
    rows, gate = x[order // k], gate[order]
  expert = jnp.minimum(chosen, num_experts - 1)
  with jax.named_scope('gate_up'):
    gate_up = kernels.gate_up.reshape(num_experts, 2 * f, d)
    h = _picked_product(rows, expert, gate_up)
  with jax.named_scope('swiglu'):
    # SwiGLU times gate with a quotient as its last step: any other would be computed within the
    # next loop, anew for each of its D outputs.
    h = h.reshape(-1, 2, f)
    a = h[:, 0] * h[:, 1] * gate[:, None] / (1 + jnp.exp(-h[:, 0]))
  with jax.named_scope('down'):
    y = _picked_product(a.astype(x.dtype), expert, kernels.down)
  with jax.named_scope('combine'):
    y = jnp.where((chosen < num_experts)[:, None], y, 0)
    if num_tokens > 1:
      before = (flat < flat[:, None]) | ((flat == flat[:, None]) & (choice < choice[:, None]))
      y = y[before.sum(axis=1, dtype=jnp.int32)]  # the inverse of `order`
    return y.reshape(num_tokens, k, d).sum(axis=1).astype(x.dtype)


def _picked_product(x: Array, expert: Array, w: Array) -> Array:
  """Each row times its expert's matrix: x [A, I], expert [A], w [E, O, I] -> [A, O] float32."""
  num_rows, width = x.shape
  lanes = _lanes(width)
  x = x.reshape(num_rows, 1, -1, lanes).astype(jnp.float32)
  w = w.reshape(*w.shape[:2], -1, lanes)
  terms = (
    x[:, :, j] * w.at[expert, :, j].get(mode='promise_in_bounds').astype(jnp.float32)
    for j in range(width // lanes)
  )
  total = functools.reduce(jnp.add, terms)
  # A product with ones, since XLA adds up a last axis one element at a time.
  return jnp.matmul(total, jnp.ones(lanes), precision=jax.lax.Precision.HIGHEST)


def _lanes(width: int) -> int:
  """The smallest divisor of the width with LANES or more lanes and MAX_TERMS terms or fewer."""
  least = max(LANES, -(-width // MAX_TERMS))
  return next(n for n in range(min(least, width), width + 1) if width % n == 0)


def _blocks(x: Array, gates: Array, expert_idx: Array, kernels: Kernels) -> Array:
  """Rows sorted by expert; the loop's trip count is that of the blocks in use."""
  (_, d), k = x.shape, gates.shape[1]
  num_experts, _, f, _ = kernels.gate_up.shape
  mean = expert_idx.size / num_experts
  size = next((b for b in BLOCKS if b >= mean), BLOCKS[-1])
  with jax.named_scope('plan'):
    plan = sorted_plan.make_plan(expert_idx, num_experts, size)
    end = jnp.cumsum(plan.group_sizes) // size
    block = jnp.arange(len(plan.row_choice) // size, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end, block, side='right'), num_experts - 1)
  rows = sorted_plan.take(x, plan.row_choice // k)
  gate = sorted_plan.take(gates.reshape(-1), plan.row_choice)[:, None]
  gate_up = kernels.gate_up.reshape(num_experts, 2 * f, d)

  def compute(i: Array, out: Array) -> Array:
    own = jax.lax.dynamic_slice_in_dim(rows, i * size, size)
    h = jnp.einsum('TD,OD->TO', own, gate_up[expert[i]]).reshape(size, 2, f).astype(jnp.float32)
    a = layers.swiglu(h) * jax.lax.dynamic_slice_in_dim(gate, i * size, size)
    y = jnp.einsum('TF,DF->TD', a.astype(x.dtype), kernels.down[expert[i]])
    return jax.lax.dynamic_update_slice_in_dim(out, y, i * size, 0)

  out = jax.lax.fori_loop(0, end[-1], compute, jnp.zeros_like(rows))
  with jax.named_scope('combine'):
    return sorted_plan.take(out, plan.choice_row).sum(axis=1, dtype=jnp.float32).astype(x.dtype)
