"""The small layers (RMSNorm, SwiGLU feed-forward), and what layers of every room share."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax import trees
from moe_jax.devices import partitioning

Array = jax.Array

TOKEN_AXES = ('act_batch', 'act_len')  # of an array [B, L, ...]


def init_weight(std: float, *axes: str) -> nn.initializers.Initializer:
  """Normal(0, std) initialiser whose parameter carries one logical axis name per dimension."""
  return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def no_gradient(tree: trees.Tree) -> Any:
  """The cotangents of integers, for the backward pass of a custom VJP."""
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tree)


def swiglu(h: Array) -> Array:
  """silu(gate) * up, [..., 2, F] -> [..., F]; index 0 of the pair is the gate (Shazeer 2020)."""
  return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]


class RMSNorm(nn.Module):
  """Root-mean-square norm with a learnt scale; the mean is taken in float32."""

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., D]."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
    scale = cast(Array, self.param('scale', scale_init, (x.shape[-1],), jnp.float32))
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * scale).astype(self.dtype)


class FeedForward(nn.Module):
  """SwiGLU FFN without biases: down(silu(gate(x)) * up(x)), gate and up fused in one kernel.

  With the mesh axis `tensor` a device has a part of F; their outputs are summed.
  """

  mlp_dim: int
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, L, D] -> [B, L, D]; under a mesh, else any [..., D]."""
    d = x.shape[-1]
    gate_up_init = init_weight(self.init_std, 'embed', 'gate_up', 'mlp')
    gate_up = self.param('gate_up', gate_up_init, (d, 2, self.mlp_dim), self.param_dtype)
    down_init = init_weight(self.init_std, 'mlp', 'embed')
    down = self.param('down', down_init, (self.mlp_dim, d), self.param_dtype)
    h = jnp.einsum('...D,DGF->...GF', x, gate_up.astype(self.dtype))
    h = partitioning.constrain(h, 'act_batch', 'act_len', None, 'act_mlp')
    return jnp.einsum('...F,FD->...D', swiglu(h), down.astype(self.dtype))
