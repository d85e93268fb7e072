"""Causal self-attention over packed documents: MHA, GQA and MQA by the number of key-value heads.

With `num_experts` the query heads are a mixture of attention heads (DS-MoE, arXiv 2404.05567): the
i-th query head of every key-value head and its output projection make expert i, all experts share
the keys and values, and a router of its own weighs what each of them adds.

A query sees the keys of its own document (segment) at or before its own position. Segment 0 is
padding: its outputs are never used and its keys are never seen by a real token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance, config
from moe_jax.models import layers, rope

Array = jax.Array


class KVCache(NamedTuple):
  """Keys and values of the tokens seen so far, for one layer."""

  key: Array  # [B, S, Nkv, H], already rotated
  value: Array  # [B, S, Nkv, H]


class Context(NamedTuple):
  """What attention needs to know of the batch; the same for every layer."""

  positions: Array  # [B, L] int32, position of each query inside its document
  segment_ids: Array  # [B, L] int32, document of each query, 0 = padding
  key_positions: Array  # [B, S] int32
  key_segment_ids: Array  # [B, S] int32
  write_index: Array | None  # [B, L] int32, cache slot of each query; None without a cache


def visible(ctx: Context) -> Array:
  """Which keys a query may see: [B, L, S] bool."""
  same = ctx.segment_ids[:, :, None] == ctx.key_segment_ids[:, None, :]
  causal = ctx.positions[:, :, None] >= ctx.key_positions[:, None, :]
  return same & causal & (ctx.key_segment_ids > 0)[:, None, :]


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Grouped softmax attention, scores in float32.

  Args:
    q: [B, L, N, H]; N = Nkv * G, query heads of one group are neighbours.
    k: [B, S, Nkv, H].
    v: [B, S, Nkv, H].
    mask: [B, L, S] bool.

  Returns:
    [B, L, N, H]. A query that sees no key (padding) gets the mean of the values, a finite number
    that no loss reads.
  """
  h = q.shape[-1]
  grouped = (*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], h)
  scores = (
    jnp.einsum('BLNGH,BSNH->BNGLS', q.reshape(grouped), k, preferred_element_type=jnp.float32)
    * h**-0.5
  )
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BNGLS,BSNH->BLNGH', probs, v).reshape(q.shape)


class Attention(nn.Module):
  """Projections, rotation, attention and output projection, without biases."""

  cfg: config.AttentionConfig
  num_heads: int
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  threshold: float = 0.0  # mixture of heads: experts with num_experts * score below it are left out

  @nn.compact
  def __call__(
    self, x: Array, ctx: Context, cache: KVCache | None
  ) -> tuple[Array, KVCache | None, balance.MixtureSums | None]:
    """Applies the layer.

    Args:
      x: [B, L, D].
      ctx: what attention needs to know of the batch.
      cache: keys and values of earlier calls, or None.

    Returns:
      ([B, L, D], the cache with this call's keys and values written into it, sums of the mixture
      of attention heads per sequence or None without one).
    """
    cfg, d = self.cfg, x.shape[-1]
    q = self._project('q', x, self.num_heads, 'heads')
    k = self._project('k', x, cfg.num_kv_heads, 'kv_heads')
    v = self._project('v', x, cfg.num_kv_heads, 'kv_heads')
    angle = rope.angles(ctx.positions, cfg.head_dim, cfg.rope_theta)
    q, k = rope.rotate(q, angle), rope.rotate(k, angle)
    if cache is not None:
      row = jnp.arange(x.shape[0])[:, None]
      # Prompts shorter than the batch's longest have their padding sent out of bounds, and dropped.
      cache = KVCache(
        cache.key.at[row, ctx.write_index].set(k, mode='drop'),
        cache.value.at[row, ctx.write_index].set(v, mode='drop'),
      )
      k, v = cache
    out = checkpoint_name(attend(q, k, v, visible(ctx)), 'attn_out')
    o_init = layers.init_weight(self.init_std, 'heads', 'head_dim', 'embed')
    o = self.param('o', o_init, (self.num_heads, cfg.head_dim, d), self.param_dtype)
    sums = None
    if cfg.num_experts:
      gates, sums = self._gates(x, ctx.segment_ids > 0)
      # Head j * num_experts + i is the i-th of key-value head j.
      grouped = out.reshape(*out.shape[:2], -1, cfg.num_experts, cfg.head_dim)
      out = (grouped * gates[:, :, None, :, None].astype(out.dtype)).reshape(out.shape)
    return jnp.einsum('BLNH,NHD->BLD', out, o.astype(self.dtype)), cache, sums

  def _gates(self, x: Array, mask: Array) -> tuple[Array, balance.MixtureSums]:
    """Weights of the attention experts [B, L, num_experts] float32, and their sums per sequence."""
    count = self.cfg.num_experts
    init = layers.init_weight(self.init_std, 'embed', 'expert')
    kernel = self.param('router', init, (x.shape[-1], count), jnp.float32)
    prob = jax.nn.softmax(
      jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    )
    active = (count * prob > self.threshold) & mask[..., None]
    real = jnp.where(mask[..., None], prob, 0.0)
    sums = balance.MixtureSums(
      num_tokens=mask.sum(axis=1, dtype=jnp.int32),
      prob=real.sum(axis=1),
      entropy=balance.entropy(real).sum(axis=1),
      active=active.sum(axis=(1, 2), dtype=jnp.int32),
    )
    return jnp.where(active, prob, 0.0), sums

  def _project(self, name: str, x: Array, heads: int, axis: str) -> Array:
    init = layers.init_weight(self.init_std, 'embed', axis, 'head_dim')
    kernel = self.param(name, init, (x.shape[-1], heads, self.cfg.head_dim), self.param_dtype)
    return jnp.einsum('BLD,DNH->BLNH', x, kernel.astype(self.dtype))
