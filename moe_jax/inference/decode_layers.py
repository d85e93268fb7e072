"""A block's layers with their weights laid out for decoding, and how they are laid out.

On a CPU every matrix has its input axis last, as `Rows`, so that a product with few rows reads it
in order, and the matrices that multiply an attention layer's input are joined. On every platform
the up-projection of latent attention is kept as its absorbed form multiplies with it. The layers
here are those of `moe_jax.models` with other weights, which they find in the variable collection
`kernels`; the layers of a model know of one layout only, that of their parameters.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.devices import hardware, partitioning
from moe_jax.models import decoder_block, layers, moe_layer
from moe_jax.models.attention import latent, multi_head
from moe_jax.models.dispatch import gather
from moe_jax.models.routers import routing

Array = jax.Array

KERNELS = 'kernels'  # the variable collection
FEW_ROWS = 16  # of a product with a matrix that a CPU computes better the other way round
MOST_PARTS, LEAST_SIZE = 8, 2**17  # of a matrix that a CPU's cores share, and numbers in a part


class Rows(NamedTuple):
  """A matrix [O, I] whose input axis is the last, as equal parts of its rows.

  XLA's CPU multiplies a matrix with one row on a single core; the products with the parts do not
  depend on each other, so that each core takes some.
  """

  parts: tuple[Array, ...]

  @property
  def num(self) -> int:
    """O."""
    return sum(map(len, self.parts))

  @property
  def dtype(self) -> jnp.dtype:
    return self.parts[0].dtype


def in_rows(w: Array) -> Rows:
  """w [O, I] in as many parts as there are cores, if O divides and they are not too small.

  Small ones are not worth the microseconds that every further operation costs.
  """
  most = min(os.cpu_count() or 1, MOST_PARTS)
  fits = (p for p in range(most, 1, -1) if len(w) % p == 0 and w.size >= p * LEAST_SIZE)
  return Rows(tuple(jnp.split(w, next(fits, 1))))


def product(x: Array, w: Rows, dtype: jnp.dtype | None = None) -> Array:
  """x times a matrix whose input axis is the last: x [..., I], w [O, I] -> [..., O].

  A CPU reads each row of w in order. It is faster with few rows of x as columns than with few rows,
  which XLA's kernels are not made for.

  Args:
    x: rows.
    w: matrix.
    dtype: of the result; None is that of x.
  """
  dtype = x.dtype if dtype is None else dtype
  rows = x.reshape(-1, x.shape[-1])
  few = 1 < len(rows) <= FEW_ROWS and hardware.platform() == 'cpu'

  def dot(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

  y = [dot(part, rows).T if few else dot(rows, part) for part in w.parts]
  return jnp.concatenate(y, axis=1).reshape(*x.shape[:-1], w.num)


class Projections(NamedTuple):
  """The weights of an attention layer's outer projections."""

  x: Rows  # [.., D], all that multiply the layer's input, one below the other
  o: Rows  # [D, N H]


class FeedForwardKernels(NamedTuple):
  """The weights of a feed-forward layer."""

  gate_up: Rows  # [2 F, D]
  down: Rows  # [D, F]


def lay_out_projections(*weights: Array) -> Projections:
  """The kernels [D, ...] that multiply the layer's input, then o [N, H, D]; copies them."""
  *from_x, o = weights
  rows = [w.reshape(len(w), -1).T for w in from_x]
  return Projections(in_rows(jnp.concatenate(rows)), in_rows(o.reshape(-1, o.shape[-1]).T))


def lay_out_feed_forward(gate_up: Array, down: Array) -> FeedForwardKernels:
  """gate_up [D, 2, F] and down [F, D] -> FeedForwardKernels; copies both."""
  return FeedForwardKernels(in_rows(gate_up.reshape(len(gate_up), -1).T), in_rows(down.T))


def lay_out(
  cfg: schema.ModelConfig, is_moe: bool, params: trees.Params
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits a block's parameters into those that stay as they are and collection `kernels`."""
  params = {name: dict(inner) for name, inner in params.items()}
  own, kernels = params['attention'], {}
  is_latent, on_cpu = cfg.attention.kind == 'mla', hardware.platform() == 'cpu'
  if is_latent:
    kernels['absorbed'] = latent.lay_out(own.pop('kv_b'), cfg.attention)
  if on_cpu:
    first = 'q_a' if 'q_a' in own else 'q'
    names = (first, 'kv_a', 'o') if is_latent else ('q', 'k', 'v', 'o')
    kernels['projections'] = lay_out_projections(*map(own.pop, names))
  kernels = {'attention': kernels} if kernels else {}
  if on_cpu and is_moe:
    moe, kernels['moe'] = params['moe'], {}
    if 'shared' in moe:
      shared = moe.pop('shared')
      kernels['moe']['shared'] = {'ffn': lay_out_feed_forward(shared['gate_up'], shared['down'])}
    if cfg.moe.dispatch != 'dense':
      kernels['moe']['experts'] = gather.lay_out(moe.pop('gate_up'), moe.pop('down'))
  elif on_cpu:
    mlp = params.pop('mlp')
    kernels['mlp'] = {'ffn': lay_out_feed_forward(mlp['gate_up'], mlp['down'])}
  return params, kernels


def layer_types(kernels: dict[str, Any]) -> decoder_block.LayerTypes:
  """The classes of a block's layers for what `lay_out` has put into collection `kernels`."""
  if 'projections' not in kernels.get('attention', {}):
    return decoder_block.LayerTypes(latent_attention=AbsorbedMLA)
  moe = RowsMoE if 'experts' in kernels.get('moe', {}) else RowsSharedMoE
  return decoder_block.LayerTypes(RowsAttention, RowsMLA, RowsFeedForward, moe)


class RowsFeedForward(layers.FeedForward):
  """`layers.FeedForward` with `FeedForwardKernels`."""

  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., D]."""
    gate_up, down = self.get_variable(KERNELS, 'ffn')
    h = product(x, gate_up).reshape(*x.shape[:-1], 2, self.mlp_dim)
    return product(layers.swiglu(h), down)


class RowsAttention(multi_head.Attention):
  """`multi_head.Attention` with `Projections`."""

  def _project_in(self, x: Array) -> tuple[Array, Array, Array]:
    num, rows = self.cfg.num_kv_heads, self.get_variable(KERNELS, 'projections').x
    heads = product(x, rows).reshape(*x.shape[:2], -1, self.cfg.head_dim)
    q, k, v = jnp.split(heads, [self.num_heads, self.num_heads + num], axis=2)
    return q, k, v

  def _output_kernel(self, d: int) -> Rows:
    return self.get_variable(KERNELS, 'projections').o

  def _project_out(self, out: Array, o: Rows) -> Array:
    return product(out.reshape(*out.shape[:2], -1), o)


class AbsorbedMLA(latent.MLA):
  """`latent.MLA` whose up-projection of keys and values is kept absorbed."""

  def _kv_b(self) -> Array:
    return latent.restore(self._absorbed())

  def _absorbed(self) -> latent.Absorbed:
    return self.get_variable(KERNELS, 'absorbed')


class RowsMLA(AbsorbedMLA):
  """The same with `Projections`."""

  def _project_in(self, x: Array) -> latent.Projected:
    rows, width = self.get_variable(KERNELS, 'projections').x, self.cfg.mla.latent_width
    q, kv = jnp.split(product(x, rows), [rows.num - width], axis=-1)
    return latent.Projected(q, self._query_up(), kv)

  def _project_out(self, out: Array, d: int) -> Array:
    o = self.get_variable(KERNELS, 'projections').o
    return product(out.reshape(*out.shape[:2], -1), o)


class RowsSharedMoE(moe_layer.MoE):
  """`moe_layer.MoE` with `RowsFeedForward` as its shared experts."""

  shared_type = RowsFeedForward


class RowsMoE(RowsSharedMoE):
  """The same with `gather.Kernels` of the routed experts, which are whole on every device."""

  def _expert_kernels(self, d: int) -> gather.Kernels:
    return self.get_variable(KERNELS, 'experts')

  def _experts(
    self, x: Array, kept: routing.Routing, kernels: gather.Kernels
  ) -> tuple[Array, Array]:
    def own(x: Array, gates: Array, expert_idx: Array, kernels: gather.Kernels) -> Array:
      tokens, gates, expert_idx = (a.reshape(-1, a.shape[-1]) for a in (x, gates, expert_idx))
      return gather.apply(tokens, gates, expert_idx, kernels).reshape(x.shape)

    axes = layers.TOKEN_AXES
    apply = partitioning.per_shard(own, (axes, axes, axes, None), axes)
    return apply(x, kept.gates, kept.expert_idx, kernels), jnp.zeros((1, 1), jnp.int32)
