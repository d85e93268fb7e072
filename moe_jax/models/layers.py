"""The small layers: RMSNorm, SwiGLU feed-forward, and the initialiser that names axes."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.devices import hardware, partitioning

Array = jax.Array

FEW_ROWS = 16  # of a product with a matrix that a CPU computes better the other way round
MOST_PARTS, LEAST_SIZE = 8, 2**17  # of a matrix that a CPU's cores share, and numbers in a part


def init_weight(std: float, *axes: str) -> nn.initializers.Initializer:
  """Normal(0, std) initialiser whose parameter carries one logical axis name per dimension."""
  return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def swiglu(h: Array) -> Array:
  """silu(gate) * up, [..., 2, F] -> [..., F]; index 0 of the pair is the gate (Shazeer 2020)."""
  return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]


class Rows(NamedTuple):
  """A matrix [N, A] whose input axis is the last, as [N / P, A] each.

  XLA's CPU multiplies a matrix with one row on a single core; the products with the parts do not
  depend on each other, so that each core takes some.
  """

  parts: tuple[Array, ...]

  @property
  def num(self) -> int:
    """N."""
    return sum(map(len, self.parts))

  @property
  def dtype(self) -> jnp.dtype:
    return self.parts[0].dtype


def in_rows(w: Array) -> Rows:
  """w [N, A] in as many parts as there are cores, if N divides and they are not too small.

  Small ones are not worth the microseconds that every further operation costs.
  """
  most = min(os.cpu_count() or 1, MOST_PARTS)
  fits = (p for p in range(most, 1, -1) if len(w) % p == 0 and w.size >= p * LEAST_SIZE)
  return Rows(tuple(jnp.split(w, next(fits, 1))))


def product(x: Array, w: Rows, dtype: jnp.dtype | None = None) -> Array:
  """x times a matrix whose input axis is the last: x [..., A], w [N, A] -> [..., N].

  For decoding (`cached_model.unstack` lays weights out so): a CPU reads each row of w in order. It
  is faster with few rows of x as columns than with few rows, which XLA's kernels are not made for.

  Args:
    x: rows.
    w: matrix.
    dtype: of the result; None is that of x.
  """
  dtype = x.dtype if dtype is None else dtype
  rows = x.reshape(-1, x.shape[-1])
  few = 1 < len(rows) <= FEW_ROWS and hardware.platform() == 'cpu'
  dot = lambda a, b: jax.lax.dot_general(
    a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype
  )
  y = [dot(part, rows).T if few else dot(rows, part) for part in w.parts]
  return jnp.concatenate(y, axis=1).reshape(*x.shape[:-1], w.num)


class RMSNorm(nn.Module):
  """Root-mean-square norm with a learnt scale; the mean is taken in float32."""

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., D]."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
    scale = self.param('scale', scale_init, (x.shape[-1],), jnp.float32)
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * scale).astype(self.dtype)


class FeedForwardKernels(NamedTuple):
  """The weights of a feed-forward layer with the input axis last."""

  gate_up: Rows  # [2 F, D]
  down: Rows  # [D, F]


def lay_out(gate_up: Array, down: Array) -> FeedForwardKernels:
  """gate_up [D, 2, F] and down [F, D] -> FeedForwardKernels; copies both."""
  return FeedForwardKernels(in_rows(gate_up.reshape(len(gate_up), -1).T), in_rows(down.T))


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
    d, laid_out = x.shape[-1], self.get_variable('kernels', 'ffn')
    if laid_out:
      h = product(x, laid_out.gate_up).reshape(*x.shape[:-1], 2, self.mlp_dim)
      return product(swiglu(h), laid_out.down)
    gate_up_init = init_weight(self.init_std, 'embed', 'gate_up', 'mlp')
    gate_up = self.param('gate_up', gate_up_init, (d, 2, self.mlp_dim), self.param_dtype)
    down_init = init_weight(self.init_std, 'mlp', 'embed')
    down = self.param('down', down_init, (self.mlp_dim, d), self.param_dtype)
    h = jnp.einsum('...D,DGF->...GF', x, gate_up.astype(self.dtype))
    h = partitioning.constrain(h, 'act_batch', 'act_len', None, 'act_mlp')
    return jnp.einsum('...F,FD->...D', swiglu(h), down.astype(self.dtype))
