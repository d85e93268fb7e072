"""Experts out of grouped products: every product over all experts at once, as kernels want it.

The gate multiplies before the second product, so that the combine is a plain gather and sum; the
backward pass needs neither the sorted copy of the input nor the experts' outputs: it keeps the
pre-activation h and recomputes the rest (the gate's gradient comes from the cotangent of the
activation, SonicMoE, arXiv 2512.14080).
"""

import jax
import jax.numpy as jnp

from moe_jax.models.experts import grouped_kernels, sorted_plan

Array = jax.Array


def _rows(tokens: Array, plan: sorted_plan.Plan) -> Array:
  """tokens [T, D] -> [R, D], each row's own; zeros on padding rows."""
  with jax.named_scope('gather'):
    return sorted_plan.take(tokens, plan.row_choice // plan.choice_row.shape[1])


def _row_gates(gates: Array, plan: sorted_plan.Plan) -> Array:
  return sorted_plan.take(gates.reshape(-1), plan.row_choice)[:, None]


def _used(rows: Array, plan: sorted_plan.Plan, limited: bool) -> Array:
  """Zeros on the rows [R, F] that no choice sits on, where a kernel may have left anything."""
  if not limited:
    return rows
  return jnp.where((plan.row_choice < plan.choice_row.size)[:, None], rows, 0)


def _swiglu(h: Array) -> Array:
  """[R, 2 F] -> [R, F] float32; halves, for a TPU would copy h to make it [R, 2, F]."""
  gate, up = (half.astype(jnp.float32) for half in jnp.split(h, 2, axis=-1))
  return jax.nn.silu(gate) * up


def forward(
  legs: grouped_kernels.Backend,
  limited: bool,
  x: Array,
  gates: Array,
  w13: Array,
  w2: Array,
  plan: sorted_plan.Plan,
) -> tuple[Array, Array]:
  """The gated sum of each token's experts [T, D], and the pre-activation h [R, G].

  Args:
    legs: grouped products.
    limited: whether the plan has rows behind its groups.
    x: [T, D].
    gates: [T, K] float32.
    w13: [E, D, G], gate before up.
    w2: [E, F, D].
    plan: its groups cover all rows, unless limited.
  """
  rows = _rows(x, plan)
  with jax.named_scope('w13'):
    h = legs.gmm(rows, w13, plan.group_sizes)
  with jax.named_scope('swiglu'):
    a = _used(_swiglu(h) * _row_gates(gates, plan), plan, limited).astype(x.dtype)
  with jax.named_scope('w2'):
    y = legs.gmm(a, w2, plan.group_sizes)
  with jax.named_scope('combine'):
    return sorted_plan.sum_rows(y, plan.choice_row), h


def backward(
  legs: grouped_kernels.Backend,
  limited: bool,
  x: Array,
  gates: Array,
  w13: Array,
  w2: Array,
  plan: sorted_plan.Plan,
  h: Array,
  d_out: Array,
) -> tuple[Array, Array, Array, Array]:
  """Gradients of x, gates, w13 and w2; arguments as `forward` has and gives them, d_out [T, D]."""
  sizes = plan.group_sizes
  d_rows = _rows(d_out, plan)
  with jax.named_scope('w2'):
    d_act = legs.gmm_t(d_rows, w2, sizes).astype(jnp.float32)  # cotangent of gate * activation
  with jax.named_scope('swiglu'):
    act, swiglu_vjp = jax.vjp(_swiglu, h)
    gate = _row_gates(gates, plan)
    d_gates = sorted_plan.take((d_act * act).sum(axis=-1), plan.choice_row)
    (d_h,) = swiglu_vjp(d_act * gate)
    d_h = _used(d_h, plan, limited)
    gated = _used(act * gate, plan, limited).astype(x.dtype)
  with jax.named_scope('w2'):
    d_w2 = legs.tgmm(gated, d_rows, sizes)
  # One thing after the other: rows of x and of d_out are never held at the same time.
  x, d_h, d_w2 = jax.lax.optimization_barrier((x, d_h, d_w2))
  rows = _rows(x, plan)
  with jax.named_scope('w13'):
    d_w13 = legs.tgmm(rows, d_h, sizes)
    d_h, d_w13 = jax.lax.optimization_barrier((d_h, d_w13))
    d_x = legs.gmm_t(d_h, w13, sizes)
  with jax.named_scope('combine'):
    return sorted_plan.sum_rows(d_x, plan.choice_row), d_gates, d_w13, d_w2
