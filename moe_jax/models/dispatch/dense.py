"""The readable reference: every expert computes every token, and a [T, E] gate matrix picks.

E / K times the work of `dropless`, which a test holds to these values and gradients.
"""

import jax
import jax.numpy as jnp

from moe_jax.models import layers

Array = jax.Array


def dispatch(
  x: Array, gates: Array, expert_idx: Array, gate_up: Array, down: Array, backend: str
) -> Array:
  """Sum over each token's K experts of gate * expert(x); arguments as in `dropless.dispatch`.

  `backend` names a grouped product, of which this reference has none.
  """
  del backend
  # Where, not times 0: what a token that is not routed holds must reach nobody, a NaN included.
  routed = (expert_idx < gate_up.shape[0]).any(axis=-1, keepdims=True)
  x = jnp.where(routed, x, 0)
  chosen = jax.nn.one_hot(expert_idx, gate_up.shape[0], dtype=jnp.float32)  # all 0 for index E
  gate_matrix = jnp.einsum('TK,TKE->TE', gates, chosen).astype(x.dtype)
  activation = layers.swiglu(jnp.einsum('TD,EDGF->TEGF', x, gate_up))
  out = jnp.einsum('TE,TEF,EFD->TD', gate_matrix, activation, down)
  return jnp.where(routed, out, 0)
