"""Integer mixing: the same bits for the same numbers on every device, sharding and JAX version."""

import jax
import jax.numpy as jnp

Array = jax.Array


def mix(x: Array) -> Array:
  """MurmurHash3's 32-bit finaliser, uint32 -> uint32: one-to-one, every output bit hangs on all."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def combine(*numbers: Array | int) -> Array:
  """One uint32 from several integers that broadcast together; their order matters."""
  key = jnp.uint32(0x9E3779B9)
  for number in numbers:
    key = mix(key ^ mix(jnp.asarray(number).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
  return key


def uniform(key: Array) -> Array:
  """uint32 -> float32 in [0, 1), a multiple of 2^-24."""
  return (key >> 8).astype(jnp.float32) * 2.0**-24
