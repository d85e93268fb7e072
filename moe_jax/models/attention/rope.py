"""Rotary position embedding (RoFormer, arXiv 2104.09864) and YaRN (arXiv 2309.00071).

Layout 'half' pairs dimension i with i + H/2; 'interleaved' pairs 2i with 2i + 1, as DeepSeek-V2 and
V3 do. Both return the pairs in half-split order: queries and keys are permuted alike, so that their
products are the same, but caches of the two layouts must not be mixed.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import attention_config

Array = jax.Array


def inv_freq(dim: int, rope: attention_config.RopeConfig) -> np.ndarray:
  """Turns per token of every pair, [dim / 2] float32: theta^(-2i/dim), slowed down under YaRN.

  YaRN keeps pairs that turn more than `beta_fast` times over the original length, divides
  by `factor` those that turn less than `beta_slow` times, and mixes linearly in the pair's number
  between the two (DeepSeek-V2's code, with its rounding of the borders).
  """
  pair = np.arange(dim // 2)
  freq = rope.theta ** (-2.0 * pair / dim)
  yarn = rope.yarn
  if yarn.factor > 1:
    low, high = correction_range(dim, rope)
    ramp = np.clip((pair - low) / (high - low), 0.0, 1.0)
    freq = (1 - ramp) * freq + ramp * freq / yarn.factor
  return freq.astype(np.float32)


def correction_range(dim: int, rope: attention_config.RopeConfig) -> tuple[float, float]:
  """The pairs between which YaRN's ramp rises, low < high."""
  yarn = rope.yarn

  def pair_of(turns: float) -> float:
    wavelength = yarn.original_max_seq_len / (turns * 2 * math.pi)
    return dim * math.log(wavelength) / (2 * math.log(rope.theta))

  low = max(math.floor(pair_of(yarn.beta_fast)), 0)
  high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
  return low, high if high > low else low + 0.001


def magnitude(rope: attention_config.RopeConfig) -> float:
  """What YaRN multiplies cosines and sines by; 1 in all released DeepSeek models."""
  yarn = rope.yarn
  above, below = (
    attention_config.yarn_mscale(yarn.factor, m) for m in (yarn.mscale, yarn.mscale_all_dim)
  )
  return above / below


def angles(positions: Array, dim: int, rope: attention_config.RopeConfig) -> Array:
  """Rotation angle of every pair: positions [B, L] -> [B, L, dim/2] float32."""
  return positions[..., None].astype(jnp.float32) * inv_freq(dim, rope)


def rotate(x: Array, angle: Array, rope: attention_config.RopeConfig) -> Array:
  """Rotates every head of x [B, L, N, H] by angle [B, L, H/2]; computed in float32."""
  size = magnitude(rope)
  cos, sin = size * jnp.cos(angle)[:, :, None], size * jnp.sin(angle)[:, :, None]
  x32 = x.astype(jnp.float32)
  if rope.layout == 'half':
    a, b = jnp.split(x32, 2, axis=-1)
  else:
    a, b = x32[..., ::2], x32[..., 1::2]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
