"""The decoder: embedding, `num_dense_layers` dense blocks, then MoE blocks, norm, output head.

Pre-norm residual blocks, x + attention(norm(x)), then x + ffn(norm(x)). Blocks of one kind are one
`nn.scan` over stacked parameters, so that tracing and compiling do not grow with depth.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance, config, partitioning
from moe_jax.models import attention, layers, moe
from moe_jax.models.routers import routing

Array = jax.Array

# Names (checkpoint_name) that each remat policy keeps. The integers of the routing are always kept.
_ALWAYS_SAVED = ('routing', 'plan')
SAVED_NAMES = {
  'moe_core': (*_ALWAYS_SAVED, 'layer_in', 'attn_out', 'moe_h'),
  'full': _ALWAYS_SAVED,
}


class Cache(NamedTuple):
  """State of incremental decoding: per-layer keys and values, and what the slots hold."""

  dense_layers: attention.KVCache | None  # arrays [num_dense_layers, B, S, Nkv, H]
  moe_layers: attention.KVCache | None  # arrays [num_moe_layers, B, S, Nkv, H]
  positions: Array  # [B, S] int32
  segment_ids: Array  # [B, S] int32, 0 = slot not written


class Output(NamedTuple):
  """What one application of the model returns."""

  logits: Array  # [B, L, V] float32
  stats: balance.RouterStats | None  # leaves stacked over the MoE layers; None for a dense model
  cache: Cache | None


class LayerInputs(NamedTuple):
  """What a block gets besides residual stream and batch; leaves [layers, ...] in a stack."""

  cache: attention.KVCache | None
  number: Array  # [] int32, number of the layer in the model
  slopes: Mapping[str, Any]  # see `balance.global_slopes`


class Stack(NamedTuple):
  """A run of blocks of one kind."""

  name: str  # of its parameters, and of its field in `Cache`
  is_moe: bool
  first: int  # number of its first layer
  length: int


def stacks(cfg: config.ModelConfig) -> list[Stack]:
  """The dense layers, then the MoE layers; a kind without layers is left out."""
  num_dense = cfg.num_layers - cfg.num_moe_layers
  kinds = (
    Stack('dense_layers', False, 0, num_dense),
    Stack('moe_layers', True, num_dense, cfg.num_moe_layers),
  )
  return [kind for kind in kinds if kind.length]


class Block(nn.Module):
  """One layer; the scan's carry is the residual stream, its scanned inputs are the layer's own."""

  cfg: config.ModelConfig
  is_moe: bool
  train: bool

  @nn.compact
  def __call__(self, x: Array, own: LayerInputs, ctx: attention.Context, tokens: routing.Tokens):
    """x [B, L, D] -> (x, (cache, RouterStats or None))."""
    cfg = self.cfg
    dtypes = dict(dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.dtype(cfg.param_dtype))
    norm = functools.partial(layers.RMSNorm, cfg.norm_eps, dtypes['dtype'])
    x = checkpoint_name(x, 'layer_in')
    attn = attention.Attention(
      cfg.attention,
      cfg.num_heads,
      cfg.init_std,
      threshold=self._attention_threshold(),
      name='attention',
      **dtypes,
    )
    with jax.named_scope('attention'):
      update, cache, mixture = attn(norm(name='attention_norm')(x), ctx, own.cache)
    x = nn.with_logical_constraint(x + update, ('act_batch', 'act_len', 'act_embed'))
    u = norm(name='ffn_norm')(x)
    if self.is_moe:
      sizes = routing.Sizes(cfg.vocab_size, cfg.max_seq_len)
      layer = moe.MoE(cfg.moe, sizes, cfg.init_std, train=self.train, name='moe', **dtypes)
      update, stats = layer(u, tokens, own.number, own.slopes)
      stats = self._add_mixture(stats, mixture, own.slopes)
    else:
      update = layers.FeedForward(cfg.mlp_dim, cfg.init_std, name='mlp', **dtypes)(u)
      stats = None
    x = nn.with_logical_constraint(x + update, ('act_batch', 'act_len', 'act_embed'))
    return x, (cache, stats)

  def _attention_threshold(self) -> float:
    """DS-MoE's threshold rule prunes attention experts too; its top-K rules keep them all."""
    options, router = self.cfg.moe.options, self.cfg.moe.router
    prunes = router == 'ds_moe' and options.inference == 'threshold' and not self.train
    return options.inference_threshold if prunes else 0.0

  def _add_mixture(self, stats, mixture, slopes):
    """Enters the mixture of attention heads into the books of the layer."""
    if stats is None or mixture is None:
      return stats
    name = 'attention_mutual_information'
    scope = self.cfg.moe.loss(name).scope
    loss = balance.scoped(
      balance.mutual_information, self.cfg.moe, scope, mixture, slopes.get(name)
    )
    return stats.replace(losses={**stats.losses, name: loss}, attention=balance.add_up(mixture))


def _stack(cfg: config.ModelConfig, is_moe: bool, train: bool, length: int, name: str) -> nn.Module:
  """`length` blocks of one kind as a scan over the leading axis of parameters and cache."""
  block = Block
  if cfg.remat != 'none':
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[cfg.remat])
    block = nn.remat(Block, policy=policy, prevent_cse=not cfg.scan_layers)
  scanned = nn.scan(
    block,
    variable_axes={'params': 0, 'router_state': 0, 'intermediates': 0},
    split_rngs={},
    in_axes=(0, nn.broadcast, nn.broadcast),
    length=length,
    unroll=1 if cfg.scan_layers else length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  return scanned(cfg, is_moe, train, name=name)


class Transformer(nn.Module):
  """Decoder-only language model.

  `train` switches what routing does in training only: jitter, random dispatch, dropping, DS-MoE's
  dense gates.
  """

  cfg: config.ModelConfig
  train: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    cache: Cache | None = None,
    *,
    row: Array | None = None,
    seed: Array | None = None,
    slopes: Mapping[str, Any] | None = None,
  ) -> Output:
    """Applies the model.

    Args:
      tokens: [B, L] int32.
      positions: [B, L] int32, position of each token inside its document.
      segment_ids: [B, L] int32, document of each token within the row; 0 = padding.
      cache: None, or the decoding state, whose slots `positions` index (one document per row).
      row: [B] int32, number of each row in the whole batch; None counts from 0.
      seed: [] uint32, what decides the random choices of routing; None is 0.
      slopes: `balance.global_slopes`, leaves [num_moe_layers, ...]; None without accumulation.

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
    row = jnp.arange(len(tokens), dtype=jnp.int32) if row is None else row
    seed = jnp.uint32(0) if seed is None else seed
    routed = routing.Tokens(tokens, segment_ids > 0, row, seed)
    ctx, cache = _context(positions, segment_ids, cache)
    found = {}
    for kind in stacks(cfg):
      stack = _stack(cfg, kind.is_moe, self.train, kind.length, kind.name)
      own = LayerInputs(
        cache=getattr(cache, kind.name, None),
        number=kind.first + jnp.arange(kind.length, dtype=jnp.int32),
        slopes=slopes if kind.is_moe and slopes else {},
      )
      x, found[kind.name] = stack(x, own, ctx, routed)
    x = layers.RMSNorm(cfg.norm_eps, dtype, name='final_norm')(x)
    head_init = layers.init_weight(cfg.init_std, 'embed', 'vocab')
    head = self.param('head', head_init, (cfg.embed_dim, cfg.vocab_size), param_dtype)
    with jax.named_scope('head'):
      logits = jnp.einsum('BLD,DV->BLV', x, head.astype(dtype), preferred_element_type=jnp.float32)
    if cache is not None:
      cache = cache._replace(**{name: layer_cache for name, (layer_cache, _) in found.items()})
    stats = found['moe_layers'][1] if 'moe_layers' in found else None
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


def init(cfg: config.ModelConfig, rng: Array) -> dict[str, Any]:
  """Variables: `params`, whose leaves are boxed with logical axis names, and `router_state`.

  A weight's numbers are decided by the seed, its name inside its layer and the layer's number. So
  models that differ in their routers or experts start from the same weights everywhere else.
  """
  empty = dataclasses.replace(cfg, num_layers=0, num_dense_layers=0)
  zeros = jnp.zeros((1, 1), jnp.int32)
  variables = {'params': dict(Transformer(empty).init(rng, zeros, zeros, zeros)['params'])}
  variables['router_state'] = {}
  for kind in stacks(cfg):
    for collection, tree in _init_stack(cfg, kind, rng).items():
      variables[collection][kind.name] = tree
  return variables


def _init_stack(cfg: config.ModelConfig, kind: Stack, rng: Array) -> dict[str, Any]:
  zeros = jnp.zeros((1, 1), jnp.int32)
  x = jnp.zeros((1, 1, cfg.embed_dim), jnp.dtype(cfg.dtype))
  tokens = routing.Tokens(zeros, zeros > 0, zeros[0], jnp.uint32(0))
  ctx, _ = _context(zeros, zeros, None)

  def init_layer(number: Array) -> dict[str, Any]:
    # 0 is left to the weights outside of the layers.
    key = jax.random.fold_in(rng, number + 1)
    own = LayerInputs(None, number, {})
    return Block(cfg, kind.is_moe, True).init(key, x, own, ctx, tokens)

  stacked = jax.vmap(init_layer)(kind.first + jnp.arange(kind.length))
  axis = {nn.PARTITION_NAME: 'layers'}
  return {k: meta.add_axis(v, 0, axis) for k, v in stacked.items()}


def moe_state(router_state: Any) -> dict[str, Array]:
  """The routers' variables, leaves [num_moe_layers, ...]; empty without any."""
  return router_state.get('moe_layers', {}).get('moe', {})


def abstract_params(cfg: config.ModelConfig) -> Any:
  """Shapes and dtypes of the parameters, as nested dicts of ShapeDtypeStruct; allocates nothing."""
  return partitioning.unbox(jax.eval_shape(lambda: init(cfg, jax.random.key(0))['params']))
