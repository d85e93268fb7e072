"""Experts out of grouped products: every product over all experts at once, as kernels want it.

The gate multiplies before the second product, so that the combine is a plain gather and sum; the
backward pass needs neither the sorted copy of the input nor the experts' outputs: it keeps the
pre-activation h and recomputes the rest (the gate's gradient comes from the cotangent of the
activation, SonicMoE, arXiv 2512.14080).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.models.experts import expert_backend, grouped_kernels, sorted_plan

Array = jax.Array


def _rows(tokens: Array, plan: sorted_plan.Plan) -> Array:
  """tokens [T, D] -> [rows, D], each row's own; zeros on padding rows."""
  with jax.named_scope('gather'):
    return sorted_plan.take(tokens, plan.row_choice // plan.choice_row.shape[1])


def _row_gates(gates: Array, plan: sorted_plan.Plan) -> Array:
  return sorted_plan.take(gates.reshape(-1), plan.row_choice)[:, None]


def _used(rows: Array, plan: sorted_plan.Plan, limited: bool) -> Array:
  """Zeros on the rows [rows, F] that no choice sits on, where a kernel may have left anything."""
  if not limited:
    return rows
  return jnp.where((plan.row_choice < plan.choice_row.size)[:, None], rows, 0)


def _swiglu(h: Array) -> Array:
  """[rows, 2 F] -> [rows, F] float32; halves, for a TPU would copy h to split its axis in two."""
  gate, up = (half.astype(jnp.float32) for half in jnp.split(h, 2, axis=-1))
  return jax.nn.silu(gate) * up


@dataclasses.dataclass(frozen=True, eq=False)
class GroupedExperts:
  """`expert_backend.ExpertBackend` out of grouped products."""

  products: grouped_kernels.Products
  covers: ClassVar[bool] = True  # unless limited

  @property
  def name(self) -> str:
    return self.products.name

  def forward(
    self, operands: expert_backend.Operands, *, keep: bool, limited: bool
  ) -> tuple[Array, Array | None]:
    """As `ExpertBackend.forward`."""
    x, gates, gate_up, down, plan = operands
    rows = _rows(x, plan)
    with jax.named_scope('gate_up'):
      h = self.products.gmm(rows, gate_up, plan.group_sizes)
    with jax.named_scope('swiglu'):
      a = _used(_swiglu(h) * _row_gates(gates, plan), plan, limited).astype(x.dtype)
    with jax.named_scope('down'):
      y = self.products.gmm(a, down, plan.group_sizes)
    with jax.named_scope('combine'):
      return sorted_plan.sum_rows(y, plan.choice_row), h if keep else None

  def backward(
    self, operands: expert_backend.Operands, h: Array, d_out: Array, *, limited: bool
  ) -> expert_backend.Gradients:
    """As `ExpertBackend.backward`."""
    x, gates, gate_up, down, plan = operands
    sizes = plan.group_sizes
    d_rows = _rows(d_out, plan)
    with jax.named_scope('down'):
      # The cotangent of gate * activation.
      d_act = self.products.gmm_t(d_rows, down, sizes).astype(jnp.float32)
    with jax.named_scope('swiglu'):
      act, swiglu_vjp = jax.vjp(_swiglu, h)
      gate = _row_gates(gates, plan)
      d_gates = sorted_plan.take((d_act * act).sum(axis=-1), plan.choice_row)
      (d_h,) = swiglu_vjp(d_act * gate)
      d_h = _used(d_h, plan, limited)
      gated = _used(act * gate, plan, limited).astype(x.dtype)
    with jax.named_scope('down'):
      d_down = self.products.tgmm(gated, d_rows, sizes)
    # One thing after the other: rows of x and of d_out are never held at the same time.
    x, d_h, d_down = jax.lax.optimization_barrier((x, d_h, d_down))
    rows = _rows(x, plan)
    with jax.named_scope('gate_up'):
      d_gate_up = self.products.tgmm(rows, d_h, sizes)
      d_h, d_gate_up = jax.lax.optimization_barrier((d_h, d_gate_up))
      d_x = self.products.gmm_t(d_h, gate_up, sizes)
    with jax.named_scope('combine'):
      d_x = sorted_plan.sum_rows(d_x, plan.choice_row)
    return expert_backend.Gradients(d_x, d_gates, d_gate_up, d_down)
