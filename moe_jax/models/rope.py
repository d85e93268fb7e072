"""Rotary position embedding (RoFormer, Su 2021), half-split: dimension i pairs with i + H/2."""

import jax
import jax.numpy as jnp

Array = jax.Array


def angles(positions: Array, head_dim: int, theta: float) -> Array:
  """Rotation angle of every pair: positions [B, L] -> [B, L, H/2] float32, m * theta^(-2i/H)."""
  inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return positions[..., None].astype(jnp.float32) * inv_freq


def rotate(x: Array, angle: Array) -> Array:
  """Rotates every head of x [B, L, N, H] by angle [B, L, H/2]; computed in float32."""
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
