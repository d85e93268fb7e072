"""The decoder: embedding, `num_dense_layers` dense blocks, then MoE blocks, norm, output head.

Pre-norm residual blocks, x + attention(norm(x)), then x + ffn(norm(x)). Blocks of one kind are one
`nn.scan` over stacked parameters, so that tracing and compiling do not grow with depth.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config, partitioning
from moe_jax.models import attention, layers, moe

Array = jax.Array

# Names (checkpoint_name) that each remat policy keeps. The integers of the routing are always kept.
_ALWAYS_SAVED = ('routing', 'plan')
SAVED_NAMES = {
  'moe_core': (*_ALWAYS_SAVED, 'layer_in', 'attn_out', 'moe_h'),
  'full': _ALWAYS_SAVED,
}


class Cache(NamedTuple):
  """State of incremental decoding: per-layer keys and values, and what the slots hold."""

  dense: attention.KVCache | None  # arrays [num_dense_layers, B, S, Nkv, H]
  moe: attention.KVCache | None  # arrays [num_moe_layers, B, S, Nkv, H]
  positions: Array  # [B, S] int32
  segment_ids: Array  # [B, S] int32, 0 = slot not written


class Output(NamedTuple):
  """What one application of the model returns."""

  logits: Array  # [B, L, V] float32
  stats: moe.RouterStats | None  # leaves stacked over the MoE layers; None for a dense model
  cache: Cache | None


class Block(nn.Module):
  """One layer; the scan's carry is the residual stream, its scanned input the layer's cache."""

  cfg: config.ModelConfig
  is_moe: bool

  @nn.compact
  def __call__(self, x: Array, cache: attention.KVCache | None, ctx: attention.Context):
    """x [B, L, D] -> (x, (cache, RouterStats or None))."""
    cfg = self.cfg
    dtypes = dict(dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.dtype(cfg.param_dtype))
    norm = functools.partial(layers.RMSNorm, cfg.norm_eps, dtypes['dtype'])
    x = checkpoint_name(x, 'layer_in')
    attn = attention.Attention(
      cfg.attention, cfg.num_heads, cfg.init_std, name='attention', **dtypes
    )
    with jax.named_scope('attention'):
      update, cache = attn(norm(name='attention_norm')(x), ctx, cache)
    x = nn.with_logical_constraint(x + update, ('act_batch', 'act_len', 'act_embed'))
    u = norm(name='ffn_norm')(x)
    if self.is_moe:
      update, stats = moe.MoE(cfg.moe, cfg.init_std, name='moe', **dtypes)(u, ctx.segment_ids > 0)
    else:
      update = layers.FeedForward(cfg.mlp_dim, cfg.init_std, name='mlp', **dtypes)(u)
      stats = None
    x = nn.with_logical_constraint(x + update, ('act_batch', 'act_len', 'act_embed'))
    return x, (cache, stats)


def _stack(cfg: config.ModelConfig, is_moe: bool, length: int, name: str) -> nn.Module:
  """`length` blocks of one kind as a scan over the leading axis of parameters and cache."""
  block = Block
  if cfg.remat != 'none':
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[cfg.remat])
    block = nn.remat(Block, policy=policy, prevent_cse=False)
  scanned = nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=(0, nn.broadcast),
    length=length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  return scanned(cfg, is_moe, name=name)


class Transformer(nn.Module):
  """Decoder-only language model."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self, tokens: Array, positions: Array, segment_ids: Array, cache: Cache | None = None
  ) -> Output:
    """Applies the model.

    Args:
      tokens: [B, L] int32.
      positions: [B, L] int32, position of each token inside its document.
      segment_ids: [B, L] int32, document of each token within the row; 0 = padding.
      cache: None, or the decoding state, whose slots `positions` index (one document per row).

    Returns:
      Output; logits [B, L, V] float32.
    """
    cfg = self.cfg
    dtype, param_dtype = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
    embedding = self.param(
      'embedding',
      layers.init_weight(cfg.init_std, 'vocab', 'embed'),
      (cfg.vocab_size, cfg.embed_dim),
      param_dtype,
    )
    x = jnp.take(embedding, tokens, axis=0).astype(dtype)
    x = nn.with_logical_constraint(x, ('act_batch', 'act_len', 'act_embed'))
    ctx, cache = _context(positions, segment_ids, cache)
    dense_cache, moe_cache = (cache.dense, cache.moe) if cache else (None, None)
    stats = None
    if cfg.num_layers > cfg.num_moe_layers:
      stack = _stack(cfg, False, cfg.num_layers - cfg.num_moe_layers, 'dense_layers')
      x, (dense_cache, _) = stack(x, dense_cache, ctx)
    if cfg.num_moe_layers:
      stack = _stack(cfg, True, cfg.num_moe_layers, 'moe_layers')
      x, (moe_cache, stats) = stack(x, moe_cache, ctx)
    x = layers.RMSNorm(cfg.norm_eps, dtype, name='final_norm')(x)
    head_init = layers.init_weight(cfg.init_std, 'embed', 'vocab')
    head = self.param('head', head_init, (cfg.embed_dim, cfg.vocab_size), param_dtype)
    with jax.named_scope('head'):
      logits = jnp.einsum('BLD,DV->BLV', x, head.astype(dtype), preferred_element_type=jnp.float32)
    if cache is not None:
      cache = cache._replace(dense=dense_cache, moe=moe_cache)
    return Output(logits, stats, cache)


def _context(
  positions: Array, segment_ids: Array, cache: Cache | None
) -> tuple[attention.Context, Cache | None]:
  if cache is None:
    ctx = attention.Context(positions, segment_ids, positions, segment_ids, None)
    return ctx, None
  slots = cache.positions.shape[1]
  write = jnp.where(segment_ids > 0, positions, slots)
  row = jnp.arange(len(positions))[:, None]
  cache = cache._replace(
    positions=cache.positions.at[row, write].set(positions, mode='drop'),
    segment_ids=cache.segment_ids.at[row, write].set(segment_ids, mode='drop'),
  )
  ctx = attention.Context(positions, segment_ids, cache.positions, cache.segment_ids, write)
  return ctx, cache


def init_cache(cfg: config.ModelConfig, batch_size: int, num_slots: int) -> Cache:
  """An empty decoding state for rows of up to `num_slots` tokens."""
  shape = (batch_size, num_slots, cfg.attention.num_kv_heads, cfg.attention.head_dim)
  num_dense = cfg.num_layers - cfg.num_moe_layers

  def kv(num_layers: int) -> attention.KVCache | None:
    zeros = lambda: jnp.zeros((num_layers, *shape), jnp.dtype(cfg.dtype))
    return attention.KVCache(zeros(), zeros()) if num_layers else None

  empty = jnp.zeros((batch_size, num_slots), jnp.int32)
  return Cache(kv(num_dense), kv(cfg.num_moe_layers), empty, empty)


def init(cfg: config.ModelConfig, rng: Array) -> Any:
  """Parameters as a nested dict whose leaves are boxed with their logical axis names."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Transformer(cfg).init(rng, tokens, tokens, tokens)['params']


def abstract_params(cfg: config.ModelConfig) -> Any:
  """Shapes and dtypes of the parameters, as nested dicts of ShapeDtypeStruct; allocates nothing."""
  return partitioning.unbox(jax.eval_shape(lambda: init(cfg, jax.random.key(0))))
