"""How alike the experts of a layer are.

Upcycled experts start as copies and should part; experts from scratch stay near 0 (Skywork-MoE,
arXiv 2406.06563, section 4). The report does not define its similarity; ours is the mean cosine
over all pairs of different experts, each taken as one vector of all its weights.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def expert_similarity(gate_up: Array, down: Array) -> Array:
  """The mean pairwise cosine of each layer's experts.

  Args:
    gate_up: [layers, E, D, 2, F] weights in any float dtype.
    down: [layers, E, F, D].

  Returns:
    [layers] float32 in [-1 / (E - 1), 1]; 1.0 for a single expert. An expert that is all zeros
    counts as at right angles to every other.
  """
  return jax.lax.map(_mean_cosine, expert_cosines(gate_up, down))


def expert_cosines(gate_up: Array, down: Array) -> Array:
  """The cosine of every two experts of a layer, arguments as above: [layers, E, E] float32.

  0 beside an expert that is all zeros, also on the diagonal.
  """
  # One layer after the other: only one of them is ever held in float32.
  return jax.lax.map(lambda layer: _cosines(_gram(layer[0]) + _gram(layer[1])), (gate_up, down))


def _gram(weights: Array) -> Array:
  """Inner products of the experts' flattened weights: [E, ...] -> [E, E] float32."""
  flat = weights.reshape(weights.shape[0], -1).astype(jnp.float32)
  return jnp.einsum('ip,jp->ij', flat, flat, precision=jax.lax.Precision.HIGHEST)


def _cosines(gram: Array) -> Array:
  """Inner products [E, E] -> cosines."""
  norm = jnp.sqrt(jnp.diagonal(gram))
  scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
  return gram * scale[:, None] * scale


def _mean_cosine(cosine: Array) -> Array:
  """[E, E] -> []."""
  e = cosine.shape[0]
  if e == 1:
    return jnp.float32(1.0)
  # The diagonal is left out, not subtracted: it would cost the digits of a similarity near 0.
  return jnp.where(jnp.eye(e, dtype=bool), 0.0, cosine).sum() / (e * (e - 1))
