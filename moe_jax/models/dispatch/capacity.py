"""Dispatch through buffers of a fixed size: every expert works on C slots, used or not.

The layout of GShard and Switch, without their [T, E, C] one-hot tensors: a table of integers says
which token sits in which slot, and each weight is one batched product, which needs no grouped
kernel. Tokens are added up by a scatter, so that the floating-point work and the memory do not
depend on the number of columns K (router 'expert_choice' has E of them, mostly unused). On a GPU
the order of that sum, and so its last bits, may differ between runs; `dropless` has no such sum.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import layers
from moe_jax.models.experts import sorted_plan

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
  """Sum over each token's K experts of gate * expert(x); arguments as in `dropless.dispatch`.

  `backend` names a grouped product, of which this dispatch has none. `room` is C: no expert may be
  chosen by more tokens. The caller ensures it by dropping before (`models/routers/capacity.py`,
  whose `slots` and `keep` share their arithmetic); assignments beyond it, in token order, would be
  left out here.
  """
  del backend
  (num_tokens, d), k = x.shape, gates.shape[1]
  with jax.named_scope('plan'):
    choice = checkpoint_name(_table(expert_idx, len(gate_up), room), 'plan')
  token = choice // k  # T where the slot is empty: gathers read zeros there, the sum drops it
  # Through float32, so that the gradients of a token's K copies are added in float32.
  rows = sorted_plan.take(x.astype(jnp.float32), token).astype(x.dtype)
  with jax.named_scope('gate_up'):
    h = checkpoint_name(jnp.einsum('ECD,EDGF->ECGF', rows, gate_up), 'moe_h')
  with jax.named_scope('swiglu'):
    gate = sorted_plan.take(gates.reshape(-1), choice)[..., None]
    a = (layers.swiglu(h.astype(jnp.float32)) * gate).astype(x.dtype)
  with jax.named_scope('down'):
    y = jnp.einsum('ECF,EFD->ECD', a, down)
  with jax.named_scope('combine'):
    out = jnp.zeros((num_tokens, d), jnp.float32).at[token].add(y.astype(jnp.float32), mode='drop')
  return out.astype(x.dtype)


def _table(expert_idx: Array, num_experts: int, slots: int) -> Array:
  """The choice that sits in each slot: expert_idx [T, K] -> [E, C] int32, T*K where it is empty."""
  plan = sorted_plan.make_plan(expert_idx, num_experts, align=1)
  end = jnp.cumsum(plan.group_sizes)[:, None]
  row = end - plan.group_sizes[:, None] + jnp.arange(slots)
  return plan.row_choice.at[jnp.where(row < end, row, expert_idx.size)].get(
    mode='fill', fill_value=expert_idx.size
  )
