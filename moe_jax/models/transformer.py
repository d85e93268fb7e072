"""The decoder: embedding, `num_dense_layers` dense blocks, then MoE blocks, norm, output head.

Pre-norm residual blocks, x + attention(norm(x)), then x + ffn(norm(x)). Blocks of one kind are one
`nn.scan` over stacked parameters, so that tracing and compiling do not grow with depth.

A layer is `decoder_block.Block`, multi-token prediction is in `token_prediction`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import trees
from moe_jax.balance import loss_scopes, router_stats
from moe_jax.config import schema, stage_rules
from moe_jax.devices import partitioning
from moe_jax.models import decoder_block, layers, moe_layer, pipeline_stages, token_prediction
from moe_jax.models.attention import multi_head, observed
from moe_jax.models.routers import routing

Array = jax.Array

# Names (checkpoint_name) that each remat policy keeps. The integers of the routing are always kept.
_ALWAYS_SAVED = ('routing', 'plan')
SAVED_NAMES = {
  'moe_core': (*_ALWAYS_SAVED, 'layer_in', 'latent', 'attn_out', 'moe_h'),
  'full': _ALWAYS_SAVED,
}


# Collections of what an experiment on a trained model changes in its layers.
_CONTROLS = (moe_layer.INTERVENTION, observed.CONTROL)


class Output(NamedTuple):
  """What one application of the model returns."""

  logits: Array  # [B, L, V] float32; unused ones the compiler leaves out
  normed: Array  # [B, L, D], what the head is applied to
  # leaves stacked over the MoE layers; None for a dense model
  stats: router_stats.RouterStats | None
  hidden: Array  # [B, L, D], what the last layer returns, before the final norm
  mtp: token_prediction.Predicted | None  # None without targets, or without modules


# What is scanned over the layers of a block's arguments.
_BLOCK_AXES = (0, nn.broadcast, nn.broadcast)


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


def _over_layers(cfg: schema.ModelConfig, layer: type[nn.Module], length: int, in_axes: Any) -> Any:
  """`layer` as a scan over the leading axis of its parameters, recomputed as `cfg.remat` says."""
  if cfg.remat != 'none':
    layer = nn.remat(layer, policy=_policy(cfg.remat), prevent_cse=not cfg.scan_layers)
  return nn.scan(
    layer,
    variable_axes=dict.fromkeys(('params', 'router_state', 'intermediates', *_CONTROLS), 0),
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

  cfg: schema.ModelConfig
  train: bool = False
  types: decoder_block.LayerTypes = decoder_block.LayerTypes()

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
    experts: Array | None = None,
    stage_micro_batches: int = 0,
  ) -> Output:
    """Applies the model.

    Args:
      tokens: [B, L] int32.
      positions: [B, L] int32, position of each token inside its document.
      segment_ids: [B, L] int32, document of each token within the row; 0 = padding.
      targets: [B, L] int32, the next token of each, -1 = not learned: runs multi-token prediction.
      row: [B] int32, number of each row in the whole batch; None counts from 0.
      seed: [] uint32, what decides the random choices of routing; None is 0.
      slopes: `loss_scopes.global_slopes`, leaves [MoE layers, ...] with those of multi-token
        prediction last; None without accumulation.
      experts: [MoE layers, B, L, K] int32, recorded choices that every MoE layer takes over, see
        `decision.replayed`; None: the routers'.
      stage_micro_batches: parts that a pipeline cuts the rows into, see `pipeline_stages.apply`.

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

    def embed(ids):
      return embedded(ids, embedding).astype(dtype)

    x = embed(tokens)
    x = partitioning.constrain(x, 'act_batch', 'act_len', 'act_embed')
    row = jnp.arange(len(tokens), dtype=jnp.int32) if row is None else row
    number = jnp.uint32(0) if seed is None else seed
    routed = routing.Tokens(tokens, segment_ids > 0, row, number)
    ctx = multi_head.Context(positions, segment_ids)
    found = {}
    for kind in decoder_block.stacks(cfg):
      number = kind.first + jnp.arange(kind.length, dtype=jnp.int32)
      own = jax.tree.map(lambda a: a[: cfg.num_moe_layers], slopes or {}) if kind.is_moe else {}
      own = decoder_block.LayerInputs(None, number, own, experts if kind.is_moe else None)
      if pipeline_stages.number() > 1 and kind == decoder_block.staged(cfg):
        micros = stage_micro_batches
        x, found[kind.name] = self._in_stages(kind, x, own, ctx, routed, micros)
        continue
      stack = _over_layers(cfg, decoder_block.Block, kind.length, _BLOCK_AXES)
      stack = stack(cfg, kind.is_moe, self.train, types=self.types, name=kind.name)
      x, (_, found[kind.name]) = stack(x, own, ctx, routed)
    hidden = x
    x = layers.RMSNorm(cfg.norm_eps, dtype, name='final_norm')(x)
    if cfg.tie_embeddings:
      head = embedding.T
    else:
      head_init = layers.init_weight(cfg.init_std, 'embed', 'vocab')
      head = self.param('head', head_init, (cfg.embed_dim, cfg.vocab_size), param_dtype)
    logits = logits_of(x, head)
    stats = found.get('moe_layers')
    mtp = None
    if targets is not None and cfg.num_mtp_layers:
      normed, mtp_stats, aims = self._predict_ahead(x, embed, targets, ctx, routed, slopes)
      mtp_logits = jax.vmap(logits_of, (0, None))(normed, head)
      mtp = token_prediction.Predicted(mtp_logits, normed, aims, mtp_stats)
    return Output(logits, x, stats, hidden, mtp)

  def _in_stages(self, kind, x, own, ctx, routed, micro_batches):
    """(x, stats) of a stack of layers that are shared by the stages of a pipeline.

    Remat 'full' keeps the inputs of stages rather than of layers.
    """
    cfg, whole = self.cfg, self.cfg.remat == 'full'
    inner = dataclasses.replace(cfg, remat='none') if whole else cfg
    length = stage_rules.layers_of_a_stage(kind.length, pipeline_stages.number())
    padded = length * pipeline_stages.number() > kind.length
    block = decoder_block.PaddedBlock if padded else decoder_block.Block
    stack = _over_layers(inner, block, length, _BLOCK_AXES)
    stack = stack(cfg, kind.is_moe, self.train, types=self.types, parent=None)

    def apply_stage(variables, *inputs):
      x, (_, stats) = stack.apply(variables, *inputs)
      return x, stats

    if whole:
      apply_stage = jax.checkpoint(apply_stage, policy=_policy('full'), prevent_cse=False)
    variables = pipeline_stages.variables_of(self, kind.name)
    options = dict(train=self.train, micro_batches=micro_batches)
    x, stats = pipeline_stages.apply(cfg, apply_stage, variables, own, x, ctx, routed, **options)
    if stats is not None:
      stats = loss_scopes.added_up(cfg.moe, stats, own.slopes)
    return x, stats

  def _predict_ahead(self, hidden, embed, targets, ctx, routed, slopes):
    """(normed hidden [M, B, L, D], stats, targets [M, B, L]) of multi-token prediction."""
    cfg = self.cfg
    depth = jnp.arange(cfg.num_mtp_layers, dtype=jnp.int32)
    seen, aims = token_prediction.tokens_ahead(
      routed.ids, targets, ctx.segment_ids, cfg.num_mtp_layers
    )
    mask, ids = seen >= 0, jnp.maximum(seen, 0)
    states = jnp.stack([embed(one) for one in ids])
    own = jax.tree.map(lambda a: a[cfg.num_moe_layers :], slopes or {}) if cfg.is_moe else {}
    own = decoder_block.LayerInputs(None, cfg.num_layers + depth, own)
    modules = _over_layers(
      cfg, token_prediction.MTPLayer, len(depth), (0, 0, nn.broadcast, nn.broadcast)
    )
    modules = modules(cfg, cfg.is_moe, self.train, name='mtp_layers')
    _, (normed, _, stats) = modules(
      hidden,
      own,
      token_prediction.Ahead(jnp.where(mask[..., None], states, 0), ids, mask),
      ctx,
      routed,
    )
    return normed, stats, aims


def apply(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  *inputs: Array,
  train: bool = False,
  **options,
) -> Output:
  """The model's output for arrays [B, L]; inputs and options of `Transformer.__call__`."""
  return cast(Output, Transformer(cfg, train).apply(variables, *inputs, **options))


def embedded(ids: Array, embedding: Array) -> Array:
  """Rows of the embedding [V, D] for ids [B, L] -> [B, L, D].

  Where FSDP splits D, every device looks up its columns for the tokens of all; then they swap, so
  that states travel and not the table. Where V is split, a device finds its tokens and adds zeros.
  """

  def look_up(ids: Array, table: Array) -> Array:
    if not partitioning.split_axes('vocab'):
      return jnp.take(table, ids, axis=0)
    local = ids - partitioning.first_index('vocab', len(table))
    local = jnp.where((local >= 0) & (local < len(table)), local, len(table))
    return partitioning.sum_over('vocab', table.at[local].get(mode='fill', fill_value=0))

  def part(ids: Array, table: Array) -> Array:
    axes = partitioning.split_axes('embed')
    if not axes:
      return look_up(ids, table)
    rows = look_up(jax.lax.all_gather(ids.reshape(-1), axes, tiled=True), table)
    whole = jax.lax.all_to_all(rows, axes, 0, 1, tiled=True)
    return whole.reshape(*ids.shape, -1)

  axes = ('act_batch', 'act_len'), ('vocab', 'embed')
  with jax.named_scope('embedding'):
    return partitioning.per_shard(part, axes, axes[0])(ids, embedding)


def head_of(cfg: schema.ModelConfig, params: trees.Params) -> Array:
  """The output head [D, V] of a model's parameters."""
  return params['embedding'].T if cfg.tie_embeddings else params['head']


def logits_of(x: Array, head: Array) -> Array:
  """The output head: normed x [B, L, D], head [D, V] -> [B, L, V] float32."""
  with jax.named_scope('head'):
    return jnp.einsum('BLD,DV->BLV', x, head.astype(x.dtype), preferred_element_type=jnp.float32)
