"""Dropless dispatch: tokens sorted by expert, grouped products, nothing dropped, static shapes.

One custom VJP around the whole expert computation. The gate multiplies before the second product,
so that the combine is a plain gather and sum; the backward pass needs neither the sorted copy of
the input nor the experts' outputs: it keeps x and the gate/up pre-activation h and recomputes the
rest (the gate's gradient comes from the cotangent of the activation, SonicMoE, arXiv 2512.14080).
No activation is ever scatter-added, so the result does not depend on the order of atomics.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import layers
from moe_jax.models.dispatch import grouped
from moe_jax.models.dispatch import plan as plan_lib

Array = jax.Array


def dispatch(
  x: Array,
  gates: Array,
  expert_idx: Array,
  gate_up: Array,
  down: Array,
  backend: str,
  room: int,
) -> Array:
  """Sum over each token's K experts of gate * expert(x).

  Args:
    x: [T, D].
    gates: [T, K] float32.
    expert_idx: [T, K] int32; E = not routed, contributes nothing.
    gate_up: [E, D, 2, F].
    down: [E, F, D].
    backend: key of `grouped.BACKENDS`, or 'auto'.
    room: choices that the buffer of all experts holds; those beyond, the last experts' last, are
      left out, so the caller counts them. 0 = all T K.

  Returns:
    [T, D] in the dtype of x.
  """
  num_experts, d = gate_up.shape[:2]
  with jax.named_scope('plan'):
    align = grouped.choose(backend).align
    plan = plan_lib.make_plan(expert_idx, num_experts, align, room or None)
    plan = jax.tree.map(lambda a: checkpoint_name(a, 'plan'), plan)
  return _experts(backend, bool(room), x, gates, gate_up.reshape(num_experts, d, -1), down, plan)


def _token(plan: plan_lib.Plan) -> Array:
  """[R]: the token that a row works for, T (out of bounds) on padding rows."""
  return plan.row_choice // plan.choice_row.shape[1]


def _row_gates(gates: Array, plan: plan_lib.Plan) -> Array:
  return plan_lib.take(gates.reshape(-1), plan.row_choice)[:, None]


def _used(rows: Array, plan: plan_lib.Plan, limited: bool) -> Array:
  """Zeros on the rows [R, F] that no choice sits on, where a kernel may have left anything."""
  if not limited:
    return rows
  return jnp.where((plan.row_choice < plan.choice_row.size)[:, None], rows, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(
  backend: str,
  limited: bool,
  x: Array,
  gates: Array,
  w13: Array,
  w2: Array,
  plan: plan_lib.Plan,
) -> Array:
  return _forward(backend, limited, x, gates, w13, w2, plan)[0]


def _forward(backend, limited, x, gates, w13, w2, plan):
  kernel = grouped.choose(backend)
  with jax.named_scope('w13'):
    h = checkpoint_name(kernel.gmm(plan_lib.take(x, _token(plan)), w13, plan.group_sizes), 'moe_h')
  with jax.named_scope('swiglu'):
    pair = h.reshape(len(h), 2, -1).astype(jnp.float32)
    a = _used(layers.swiglu(pair) * _row_gates(gates, plan), plan, limited).astype(x.dtype)
  with jax.named_scope('w2'):
    y = kernel.gmm(a, w2, plan.group_sizes)
  with jax.named_scope('combine'):
    out = plan_lib.sum_rows(y, plan.choice_row)
  return out, (x, gates, w13, w2, plan, h)


def _backward(backend, limited, residuals, d_out):
  x, gates, w13, w2, plan, h = residuals
  kernel, sizes = grouped.choose(backend), plan.group_sizes
  d_rows = plan_lib.take(d_out, _token(plan))
  with jax.named_scope('w2'):
    d_act = kernel.gmm_t(d_rows, w2, sizes).astype(jnp.float32)  # cotangent of gate * activation
  with jax.named_scope('swiglu'):
    pair = h.reshape(len(h), 2, -1).astype(jnp.float32)
    act, swiglu_vjp = jax.vjp(layers.swiglu, pair)
    gate = _row_gates(gates, plan)
    d_gates = plan_lib.take((d_act * act).sum(axis=-1), plan.choice_row)
    (d_pair,) = swiglu_vjp(d_act * gate)
    d_h = _used(d_pair.reshape(h.shape), plan, limited).astype(h.dtype)
    gated = _used(act * gate, plan, limited).astype(x.dtype)
  with jax.named_scope('w2'):
    d_w2 = kernel.tgmm(gated, d_rows, sizes)
  with jax.named_scope('w13'):
    d_w13 = kernel.tgmm(plan_lib.take(x, _token(plan)), d_h, sizes)
    d_x = plan_lib.sum_rows(kernel.gmm_t(d_h, w13, sizes), plan.choice_row)
  no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
  return d_x, d_gates, d_w13, d_w2, no_gradient


_experts.defvjp(_forward, _backward)
