"""The readable reference: every expert computes every token, and a [T, E] gate matrix picks.

E / K times the work of `dropless`, which a test holds to these values and gradients.
"""

import jax
import jax.numpy as jnp

from moe_jax.models import layers

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

  `backend` names a grouped product, `room` the size of a buffer; this reference has neither.
  """
  del backend, room
  # Where, not times 0: what a token that is not routed holds must reach nobody, a NaN included.
  routed = (expert_idx < gate_up.shape[0]).any(axis=-1, keepdims=True)
  x = jnp.where(routed, x, 0)
  # A scatter, not a one-hot product: K may be as large as E.
  token = jnp.arange(len(x))[:, None]
  gate_matrix = jnp.zeros((len(x), len(gate_up)), jnp.float32)
  gate_matrix = gate_matrix.at[token, expert_idx].add(gates, mode='drop').astype(x.dtype)
  with jax.named_scope('gate_up'):
    h = jnp.einsum('TD,EDGF->TEGF', x, gate_up)
  with jax.named_scope('swiglu'):
    activation = layers.swiglu(h)
  with jax.named_scope('down'):
    out = jnp.einsum('TE,TEF,EFD->TD', gate_matrix, activation, down)
  return jnp.where(routed, out, 0)
