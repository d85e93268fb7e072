"""Causal self-attention over packed documents: MHA, GQA and MQA by the number of key-value heads.

With `num_experts` the query heads are a mixture of attention heads (DS-MoE, arXiv 2404.05567): the
i-th query head of every key-value head and its output projection make expert i, all experts share
the keys and values, and a router of its own weighs what each of them adds.

A query sees the keys of its own document (segment) at or before its own position. Segment 0 is
padding: its outputs are never used and its keys are never seen by a real token. When text is
generated, a row is one document and slot i of a cache belongs to its position i.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.balance import router_stats
from moe_jax.config import attention_config
from moe_jax.models import layers
from moe_jax.models.attention import kernels, rope
from moe_jax.models.attention.kernels import reference, sharded

Array = jax.Array
_Cache = TypeVar('_Cache', bound=tuple)


class KVCache(NamedTuple):
  """Keys and values of one layer."""

  key: Array  # [B, S, Nkv, H], already rotated
  value: Array  # [B, S, Nkv, H]


class Context(NamedTuple):
  """What attention needs to know of the batch; the same for every layer."""

  positions: Array  # [B, L] int32, position of each query inside its document
  segment_ids: Array  # [B, L] int32, document of each query, 0 = padding


def write(cache: _Cache, new: _Cache, positions: Array) -> _Cache:
  """Puts entries [B, L, ...] into a cache [B, S, ...] at the slots of their positions.

  Positions beyond the last slot are dropped.
  """
  if positions.size == 1:
    # Twice: XLA turns a scatter of one entry into an update of a slice, repeats that within each
    # of the cache's readers, and copies the cache for every one of them.
    positions, new = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), (positions, new))
  row = jnp.arange(len(positions))[:, None]
  return jax.tree.map(
    lambda c, n: c.at[row, positions].set(n.astype(c.dtype), mode='drop'), cache, new
  )


def seen_slots(positions: Array, num_slots: int) -> Array:
  """Which slots of a cache a query at a position sees: [B, L] -> [B, L, S] bool."""
  return jnp.arange(num_slots) <= positions[..., None]


def project_out(out: Array, o: Array) -> Array:
  """The output projection: heads [B, L, N, H], o [N, H, D] -> [B, L, D].

  Heads and their width are one axis: contracted as two, a CPU would transpose the weights first.
  """
  flat = out.reshape(*out.shape[:2], -1)
  return jnp.einsum('BLH,HD->BLD', flat, o.reshape(-1, o.shape[-1]))


def attend_own(
  cfg: attention_config.AttentionConfig,
  q: Array,
  source: sharded.Source,
  ctx: Context,
  v_head_dim: int,
) -> Array:
  """Attention of a call's tokens among themselves, by the implementation that `cfg` names.

  Args:
    cfg: implementation and scale.
    q: [B, L, N, H].
    source: of keys [B, L, Nkv, H] and values [B, L, Nkv, Hv].
    ctx: which tokens see each other.
    v_head_dim: Hv.

  Returns:
    [B, L, N, Hv].
  """
  impl = kernels.choose(
    cfg.impl, head_dim=q.shape[-1], v_head_dim=v_head_dim, length=q.shape[1], dtype=q.dtype
  )
  fn = functools.partial(kernels.ATTENDS[impl], scale=cfg.softmax_scale)
  return sharded.attend(fn, q, source, *ctx)


def attend_unobserved(module: Any, *args: Any) -> Array:
  """`attend_own` as layers call it, with themselves before its arguments; keeps nothing."""
  del module
  return attend_own(*args)


class Attention(nn.Module):
  """Projections, rotation, attention and output projection, without biases."""

  cfg: attention_config.AttentionConfig
  num_heads: int
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  threshold: float = 0.0  # mixture of heads: experts with num_experts * score below it are left out

  # What attends when there is no cache: `attend_unobserved`, or that of `observed`.
  attend: ClassVar[Callable[..., Array]] = staticmethod(attend_unobserved)

  @nn.compact
  def __call__(
    self, x: Array, ctx: Context, cache: KVCache | None
  ) -> tuple[Array, KVCache, router_stats.MixtureSums | None]:
    """Applies the layer.

    Args:
      x: [B, L, D].
      ctx: what attention needs to know of the batch.
      cache: of the earlier tokens of each row, or None: the queries see the keys of this call.

    Returns:
      ([B, L, D]; the cache with this call's entries, which are all of it without one; sums of the
      mixture of attention heads per sequence, or None without one).
    """
    cfg, d = self.cfg, x.shape[-1]
    q, k, v = self._project_in(x)
    angle = rope.angles(ctx.positions, cfg.head_dim, cfg.rope)
    q, k = rope.rotate(q, angle, cfg.rope), rope.rotate(k, angle, cfg.rope)
    own = KVCache(k, v)
    if cache is None:
      source = sharded.Source((k, v), lambda k, v: (k, v))
      cache, out = own, self.attend(self, cfg, q, source, ctx, cfg.head_dim)
    else:
      cache = write(cache, own, ctx.positions)
      mask = seen_slots(ctx.positions, cache.key.shape[1])
      out = reference.masked(q, cache.key, cache.value, mask, cfg.softmax_scale)
    o, sums = self._output_kernel(d), None
    if cfg.num_experts:
      gates, sums = self._gates(x, ctx.segment_ids > 0)
      # Head j * num_experts + i is the i-th of key-value head j.
      grouped = out.reshape(*out.shape[:2], -1, cfg.num_experts, cfg.head_dim)
      out = (grouped * gates[:, :, None, :, None].astype(out.dtype)).reshape(out.shape)
    return self._project_out(out, o), cache, sums

  def _output_kernel(self, d: int) -> Array:
    init = layers.init_weight(self.init_std, 'heads', 'head_dim', 'embed')
    shape = (self.num_heads, self.cfg.head_dim, d)
    return self.param('o', init, shape, self.param_dtype).astype(self.dtype)

  def _project_out(self, out: Array, o: Array) -> Array:
    return project_out(out, o)

  def _gates(self, x: Array, mask: Array) -> tuple[Array, router_stats.MixtureSums]:
    """Weights of the attention experts [B, L, num_experts] float32, and their sums per sequence."""
    count = self.cfg.num_experts
    init = layers.init_weight(self.init_std, 'router_embed', 'router_expert')
    kernel = self.param('router', init, (x.shape[-1], count), jnp.float32)
    prob = jax.nn.softmax(
      jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    )
    active = (count * prob > self.threshold) & mask[..., None]
    real = jnp.where(mask[..., None], prob, 0.0)
    sums = router_stats.MixtureSums(
      num_tokens=mask.sum(axis=1, dtype=jnp.int32),
      prob=real.sum(axis=1),
      entropy=router_stats.entropy(real).sum(axis=1),
      active=active.sum(axis=(1, 2), dtype=jnp.int32),
    )
    return jnp.where(active, prob, 0.0), sums

  def _project_in(self, x: Array) -> tuple[Array, Array, Array]:
    """Queries [B, L, N, H], keys and values [B, L, Nkv, H], not rotated."""
    num = self.cfg.num_kv_heads
    q = self._project('q', x, self.num_heads, 'heads')
    return q, self._project('k', x, num, 'kv_heads'), self._project('v', x, num, 'kv_heads')

  def _project(self, name: str, x: Array, heads: int, axis: str) -> Array:
    init = layers.init_weight(self.init_std, 'embed', axis, 'head_dim')
    kernel = self.param(name, init, (x.shape[-1], heads, self.cfg.head_dim), self.param_dtype)
    return jnp.einsum('BLD,DNH->BLNH', x, kernel.astype(self.dtype))
