"""The decoder: embedding, `num_dense_layers` dense blocks, then MoE blocks, norm, output head.

Pre-norm residual blocks, x + attention(norm(x)), then x + ffn(norm(x)). Blocks of one kind are one
`nn.scan` over stacked parameters, so that tracing and compiling do not grow with depth.

Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) adds modules behind the last
layer, which see one, two, ... tokens more and predict the one after; they train only, unless they
draft for the model when text is generated.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from moe_jax import balance, config, partitioning
from moe_jax.models import attention, layers, mla, moe
from moe_jax.models.routers import routing

Array = jax.Array

# Names (checkpoint_name) that each remat policy keeps. The integers of the routing are always kept.
_ALWAYS_SAVED = ('routing', 'plan')
SAVED_NAMES = {
  'moe_core': (*_ALWAYS_SAVED, 'layer_in', 'latent', 'attn_out', 'moe_h'),
  'full': _ALWAYS_SAVED,
}


# Keys and values of one layer, or of a stack with a leading axis of layers.
LayerCache = attention.KVCache | mla.LatentCache


class Output(NamedTuple):
  """What one application of the model returns."""

  logits: Array  # [B, L, V] float32; where nobody reads them the compiler leaves them out
  normed: Array  # [B, L, D], what the head is applied to
  stats: balance.RouterStats | None  # leaves stacked over the MoE layers; None for a dense model
  hidden: Array  # [B, L, D], what the last layer returns, before the final norm
  mtp: 'Predicted | None'  # None without targets, or without modules


class Predicted(NamedTuple):
  """What the M modules of multi-token prediction say."""

  logits: Array  # [M, B, L, V] float32
  normed: Array  # [M, B, L, D], what the head is applied to
  targets: Array  # [M, B, L] int32, the token that depth k predicts, k + 1 ahead; -1 = none
  stats: balance.RouterStats | None  # leaves [M, ...]


class LayerInputs(NamedTuple):
  """What a block gets besides residual stream and batch; leaves [layers, ...] in a stack."""

  cache: LayerCache | None  # None outside of decoding
  number: Array  # [] int32, number of the layer in the model
  slopes: Mapping[str, Any]  # see `balance.global_slopes`


class Ahead(NamedTuple):
  """What a module of multi-token prediction gets besides; leaves [M, ...] in a scan."""

  embedded: Array  # [B, L, D], embedding of the token that its depth sees more
  ids: Array  # [B, L] int32, that token; 0 where the document has ended
  mask: Array  # [B, L] bool, whether the document goes on that far


class Stack(NamedTuple):
  """A run of blocks of one kind."""

  name: str  # of its parameters
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
  keep_cache: bool = False  # return the keys and values of this call although it has no cache

  @nn.compact
  def __call__(self, x: Array, own: LayerInputs, ctx: attention.Context, tokens: routing.Tokens):
    """x [B, L, D] -> (x, (cache, RouterStats or None))."""
    cfg = self.cfg
    dtypes = dict(dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.dtype(cfg.param_dtype))
    norm = functools.partial(layers.RMSNorm, cfg.norm_eps, dtypes['dtype'])
    x = checkpoint_name(x, 'layer_in')
    attn = self._attention(dtypes)
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
    return x, (cache if self.keep_cache or own.cache is not None else None, stats)

  def _attention(self, dtypes: Mapping[str, Any]) -> nn.Module:
    cfg = self.cfg
    sizes = (cfg.attention, cfg.num_heads, cfg.init_std)
    if cfg.attention.kind == 'mla':
      return mla.MLA(*sizes, name='attention', **dtypes)
    threshold = self._attention_threshold()
    return attention.Attention(*sizes, threshold=threshold, name='attention', **dtypes)

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


class MTPLayer(nn.Module):
  """One depth of multi-token prediction: h' = M [norm(Emb(t_{i+k})); norm(h)], then a block.

  DeepSeek-V3, Eq. 21-23; the embedding comes first, as in the released weights and unlike in the
  formula. h of depth 1 is the model's last state behind its final norm, as transformers and vLLM
  hand it to the released module (the report does not say); that of depth k + 1 is what the block of
  depth k returns.
  """

  cfg: config.ModelConfig
  is_moe: bool
  train: bool
  keep_cache: bool = False

  @nn.compact
  def __call__(
    self,
    hidden: Array,
    own: LayerInputs,
    ahead: Ahead,
    ctx: attention.Context,
    tokens: routing.Tokens,
  ):
    """hidden [B, L, D] of the depth before -> (hidden, (normed for the head, cache, stats))."""
    cfg = self.cfg
    dtype = jnp.dtype(cfg.dtype)
    norm = functools.partial(layers.RMSNorm, cfg.norm_eps, dtype)
    pair = [norm(name='embedding_norm')(ahead.embedded), norm(name='hidden_norm')(hidden)]
    init = layers.init_weight(cfg.init_std, 'mtp_pair', 'embed')
    shape = (2 * cfg.embed_dim, cfg.embed_dim)
    projection = self.param('projection', init, shape, jnp.dtype(cfg.param_dtype)).astype(dtype)
    x = jnp.einsum('BLD,DE->BLE', jnp.concatenate(pair, axis=-1), projection)
    # A token without a successor is not routed, and no other token sees it.
    tokens = tokens._replace(ids=ahead.ids, mask=ahead.mask)
    block = Block(cfg, self.is_moe, self.train, self.keep_cache, name='block')
    x, (cache, stats) = block(x, own, ctx, tokens)
    return x, (norm(name='norm')(x), cache, stats)


def _policy(remat: str) -> Callable[..., Any]:
  """What the backward pass finds: `SAVED_NAMES`; 'offload' keeps a layer's input on the host."""
  policies = jax.checkpoint_policies
  if remat != 'offload':
    return policies.save_only_these_names(*SAVED_NAMES[remat])
  return policies.save_and_offload_only_these_names(
    names_which_can_be_saved=list(_ALWAYS_SAVED),
    names_which_can_be_offloaded=['layer_in'],
    offload_src='device',
    offload_dst='pinned_host',
  )


def _over_layers(
  cfg: config.ModelConfig, layer: type[nn.Module], length: int, in_axes: tuple[Any, ...]
) -> Any:
  """`layer` as a scan over the leading axis of its parameters, recomputed as `cfg.remat` says."""
  if cfg.remat != 'none':
    layer = nn.remat(layer, policy=_policy(cfg.remat), prevent_cse=not cfg.scan_layers)
  return nn.scan(
    layer,
    variable_axes={'params': 0, 'router_state': 0, 'intermediates': 0, moe.INTERVENTION: 0},
    split_rngs={},
    in_axes=in_axes,
    length=length,
    unroll=1 if cfg.scan_layers else length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )


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
    *,
    targets: Array | None = None,
    row: Array | None = None,
    seed: Array | None = None,
    slopes: Mapping[str, Any] | None = None,
  ) -> Output:
    """Applies the model.

    Args:
      tokens: [B, L] int32.
      positions: [B, L] int32, position of each token inside its document.
      segment_ids: [B, L] int32, document of each token within the row; 0 = padding.
      targets: [B, L] int32, the next token of each, -1 = none: runs multi-token prediction.
      row: [B] int32, number of each row in the whole batch; None counts from 0.
      seed: [] uint32, what decides the random choices of routing; None is 0.
      slopes: `balance.global_slopes`, leaves [MoE layers, ...] with those of multi-token
        prediction last; None without accumulation.

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
    embed = lambda ids: embedded(ids, embedding).astype(dtype)
    x = embed(tokens)
    x = nn.with_logical_constraint(x, ('act_batch', 'act_len', 'act_embed'))
    row = jnp.arange(len(tokens), dtype=jnp.int32) if row is None else row
    seed = jnp.uint32(0) if seed is None else seed
    routed = routing.Tokens(tokens, segment_ids > 0, row, seed)
    ctx = attention.Context(positions, segment_ids)
    found = {}
    for kind in stacks(cfg):
      stack = _over_layers(cfg, Block, kind.length, (0, nn.broadcast, nn.broadcast))
      stack = stack(cfg, kind.is_moe, self.train, name=kind.name)
      number = kind.first + jnp.arange(kind.length, dtype=jnp.int32)
      own = jax.tree.map(lambda a: a[: cfg.num_moe_layers], slopes or {}) if kind.is_moe else {}
      x, (_, found[kind.name]) = stack(x, LayerInputs(None, number, own), ctx, routed)
    hidden = x
    x = layers.RMSNorm(cfg.norm_eps, dtype, name='final_norm')(x)
    head_init = layers.init_weight(cfg.init_std, 'embed', 'vocab')
    head = self.param('head', head_init, (cfg.embed_dim, cfg.vocab_size), param_dtype)
    logits = logits_of(x, head)
    stats = found.get('moe_layers')
    mtp = None
    if targets is not None and cfg.num_mtp_layers:
      normed, mtp_stats, aims = self._predict_ahead(x, embed, targets, ctx, routed, slopes)
      mtp_logits = jax.vmap(logits_of, (0, None))(normed, head)
      mtp = Predicted(mtp_logits, normed, aims, mtp_stats)
    return Output(logits, x, stats, hidden, mtp)

  def _predict_ahead(self, hidden, embed, targets, ctx, routed, slopes):
    """(normed hidden [M, B, L, D], stats, targets [M, B, L]) of multi-token prediction."""
    cfg = self.cfg
    depth = jnp.arange(cfg.num_mtp_layers, dtype=jnp.int32)
    seen = tokens_ahead(targets, ctx.segment_ids, cfg.num_mtp_layers + 1)
    mask = seen[:-1] >= 0
    ids = jnp.maximum(seen[:-1], 0)
    states = jnp.stack([embed(one) for one in ids])
    own = jax.tree.map(lambda a: a[cfg.num_moe_layers :], slopes or {}) if cfg.is_moe else {}
    own = LayerInputs(None, cfg.num_layers + depth, own)
    modules = _over_layers(cfg, MTPLayer, len(depth), (0, 0, nn.broadcast, nn.broadcast))
    modules = modules(cfg, cfg.is_moe, self.train, name='mtp_layers')
    _, (normed, _, stats) = modules(
      hidden, own, Ahead(jnp.where(mask[..., None], states, 0), ids, mask), ctx, routed
    )
    return normed, stats, seen[1:]


def embedded(ids: Array, embedding: Array) -> Array:
  """Rows of the embedding [V, D] for ids [B, L] -> [B, L, D].

  Where FSDP splits D, every device looks up its columns for the tokens of all; then they swap, so
  that states travel and not the table. Where V is split, a device finds its tokens and adds zeros.
  """

  def look_up(ids: Array, table: Array) -> Array:
    if partitioning.axis_size('tensor') > 1:
      local = ids - jax.lax.axis_index('tensor') * len(table)
      local = jnp.where((local >= 0) & (local < len(table)), local, len(table))
      return jax.lax.psum(table.at[local].get(mode='fill', fill_value=0), 'tensor')
    return jnp.take(table, ids, axis=0)

  def part(ids: Array, table: Array) -> Array:
    axes = partitioning.fsdp_axes()
    if not axes:
      return look_up(ids, table)
    rows = look_up(jax.lax.all_gather(ids.reshape(-1), axes, tiled=True), table)
    whole = jax.lax.all_to_all(rows, axes, 0, 1, tiled=True)
    return whole.reshape(*ids.shape, -1)

  axes = ('act_batch', 'act_len'), ('vocab', 'embed')
  with jax.named_scope('embedding'):
    return partitioning.per_shard(part, axes, axes[0])(ids, embedding)


def tokens_ahead(targets: Array, segment_ids: Array, num: int) -> Array:
  """[num, B, L] int32: the 1st, 2nd, ... token after each, -1 where its document has ended.

  Args:
    targets: [B, L] int32, the first of them.
    segment_ids: [B, L] int32, documents.
    num: how many.
  """
  found = [targets]
  for _ in range(num - 1):
    later = jnp.pad(found[-1][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    same = segment_ids == jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    found.append(jnp.where(same & (targets >= 0), later, -1))
  return jnp.stack(found)


def logits_of(x: Array, head: Array) -> Array:
  """The output head: normed x [B, L, D], head [D, V] -> [B, L, V] float32."""
  with jax.named_scope('head'):
    return jnp.einsum('BLD,DV->BLV', x, head.astype(x.dtype), preferred_element_type=jnp.float32)


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
  if cfg.num_mtp_layers:
    kind = Stack('mtp_layers', cfg.is_moe, cfg.num_layers, cfg.num_mtp_layers)
    for collection, tree in _init_stack(cfg, kind, rng).items():
      variables[collection][kind.name] = tree
  return variables


def _init_stack(cfg: config.ModelConfig, kind: Stack, rng: Array) -> dict[str, Any]:
  zeros = jnp.zeros((1, 1), jnp.int32)
  x = jnp.zeros((1, 1, cfg.embed_dim), jnp.dtype(cfg.dtype))
  tokens = routing.Tokens(zeros, zeros > 0, zeros[0], jnp.uint32(0))
  ctx = attention.Context(zeros, zeros)

  def init_layer(number: Array) -> dict[str, Any]:
    # 0 is left to the weights outside of the layers.
    key = jax.random.fold_in(rng, number + 1)
    own = LayerInputs(None, number, {})
    if kind.name == 'mtp_layers':
      ahead = Ahead(x, zeros, zeros > 0)
      return MTPLayer(cfg, kind.is_moe, True).init(key, x, own, ahead, ctx, tokens)
    return Block(cfg, kind.is_moe, True).init(key, x, own, ctx, tokens)

  stacked = jax.vmap(init_layer)(kind.first + jnp.arange(kind.length))
  axis = {nn.PARTITION_NAME: 'layers'}
  return {k: meta.add_axis(v, 0, axis) for k, v in stacked.items()}


def moe_state(router_state: Any) -> dict[str, Array]:
  """The routers' variables, leaves [MoE layers, ...] with multi-token prediction's last."""
  main = router_state.get('moe_layers', {}).get('moe', {})
  ahead = router_state.get('mtp_layers', {}).get('block', {}).get('moe', {})
  return {k: jnp.concatenate([v, ahead[k]]) if ahead else v for k, v in main.items()}


def with_moe_state(cfg: config.ModelConfig, state: Mapping[str, Array]) -> dict[str, Any]:
  """The inverse of `moe_state`: collection `router_state` of the whole model."""
  if not state:
    return {}
  split = lambda cut: {'moe': {k: v[cut] for k, v in state.items()}}
  found = {'moe_layers': split(slice(cfg.num_moe_layers))}
  if cfg.num_mtp_layers:
    found['mtp_layers'] = {'block': split(slice(cfg.num_moe_layers, None))}
  return found


def moe_params(params: Any) -> dict[str, Any]:
  """The parameters of the MoE layers, leaves [MoE layers, ...], multi-token prediction's last."""
  main = params['moe_layers']['moe']
  if 'mtp_layers' not in params:
    return main
  return jax.tree.map(
    lambda *leaves: jnp.concatenate(leaves), main, params['mtp_layers']['block']['moe']
  )


def abstract_params(cfg: config.ModelConfig) -> Any:
  """Shapes and dtypes of the parameters, as nested dicts of ShapeDtypeStruct; allocates nothing."""
  return partitioning.unbox(jax.eval_shape(lambda: init(cfg, jax.random.key(0))['params']))
