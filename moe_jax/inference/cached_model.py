"""Cached generation, layer by layer: the prefill of prompts, then steps of a few tokens per row.

Training scans over stacked layers; here each layer has its own weights and its own cache, so that a
step copies neither: a scan would cut the weights out of the stacks and write every cache anew for
each token. The mathematics is that of `decoder_block.Block`, which both apply.

Slot i of a cache belongs to position i of its row, and a row is one document.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.devices import hardware
from moe_jax.inference import decode_layers
from moe_jax.models import decoder_block, transformer
from moe_jax.models import layers as layers_lib
from moe_jax.models.attention import multi_head
from moe_jax.models.routers import routing

Array = jax.Array
Caches = tuple[decoder_block.LayerCache, ...]  # one per layer, arrays [B, S, ...]


@struct.dataclass
class Weights:
  """A model's variables, layer by layer."""

  embedding: Array  # [V, D]
  layers: tuple[dict[str, Any], ...]  # variables of one `decoder_block.Block` each
  final_norm: dict[str, Array]
  head: Array | None  # [D, V]; None where `head_rows` is in its place
  head_rows: decode_layers.Rows | None = None  # [V, D]


class Decoded(NamedTuple):
  """What an application of the model returns."""

  hidden: Array  # [B, L, D], before the final norm
  caches: Caches
  experts: Array | None = None  # [MoE layers, B, L, K] int32, chosen; only if asked for


def unstack(cfg: schema.ModelConfig, variables: trees.Variables) -> Weights:
  """Takes the stacks of layers apart: every weight of a layer is copied once.

  Weights wider than the compute dtype are rounded to it, as every application of the model would.
  They are laid out as `decode_layers` multiplies with them. No weight is kept twice; `variables`
  can be let go.
  """
  params, state = variables['params'], variables.get('router_state', {})
  dtype = jnp.dtype(cfg.dtype)

  def narrow(path, leaf):
    keep = path[-1].key in ('scale', 'router') or leaf.dtype.itemsize <= dtype.itemsize
    return leaf if keep else leaf.astype(dtype)

  lay_out = jax.jit(decode_layers.lay_out, static_argnums=(0, 1))
  found = []
  for kind in decoder_block.stacks(cfg):
    for i in range(kind.length):
      own = jax.tree.map(lambda a: a[i], params[kind.name])  # noqa: B023
      own = jax.tree_util.tree_map_with_path(narrow, own)
      own, kernels = lay_out(cfg, kind.is_moe, own)
      layer = {'router_state': jax.tree.map(lambda a: a[i], state.get(kind.name, {}))}  # noqa: B023
      found.append({'params': own, decode_layers.KERNELS: kernels, **layer})
  outside = {k: params[k] for k in ('embedding', 'final_norm')}
  outside['head'] = transformer.head_of(cfg, params)
  outside = jax.tree_util.tree_map_with_path(narrow, outside)
  if hardware.platform() == 'cpu':
    outside |= {
      'head': None,
      'head_rows': jax.jit(lambda w: decode_layers.in_rows(w.T))(outside['head']),
    }
  return Weights(layers=tuple(found), **outside)


def _embed(cfg: schema.ModelConfig, weights: Weights, tokens: Array) -> Array:
  return jnp.take(weights.embedding, tokens, axis=0).astype(jnp.dtype(cfg.dtype))


def normed(cfg: schema.ModelConfig, weights: Weights, hidden: Array) -> Array:
  """The final norm applied to hidden [B, L, D] of `Decoded`."""
  norm = layers_lib.RMSNorm(cfg.norm_eps, jnp.dtype(cfg.dtype))
  return cast(Array, norm.apply({'params': weights.final_norm}, hidden))


def logits_of(cfg: schema.ModelConfig, weights: Weights, hidden: Array) -> Array:
  """hidden [B, L, D] of `Decoded` -> logits [B, L, V] float32."""
  return head(weights, normed(cfg, weights, hidden))


def head(weights: Weights, x: Array) -> Array:
  """x [B, L, D] behind the final norm, or a norm of its own, -> logits [B, L, V] float32."""
  if weights.head_rows is None:
    assert weights.head is not None
    return transformer.logits_of(x, weights.head)
  with jax.named_scope('head'):
    return decode_layers.product(x, weights.head_rows, jnp.float32)


def _apply(
  cfg: schema.ModelConfig,
  weights: Weights,
  tokens: Array,
  ctx: multi_head.Context,
  caches: Caches | None,
  keep_experts: bool,
) -> Decoded:
  x = _embed(cfg, weights, tokens)
  row = jnp.arange(len(tokens), dtype=jnp.int32)
  routed = routing.Tokens(tokens, ctx.segment_ids > 0, row, jnp.uint32(0), ctx.positions)
  kinds = [kind for kind in decoder_block.stacks(cfg) for _ in range(kind.length)]
  new, experts = [], []
  for number, (kind, own) in enumerate(zip(kinds, weights.layers, strict=True)):
    inputs = decoder_block.LayerInputs(caches[number] if caches else None, jnp.int32(number), {})
    types = decode_layers.layer_types(own[decode_layers.KERNELS])
    block = decoder_block.Block(cfg, kind.is_moe, train=False, keep_cache=True, types=types)
    if keep_experts and kind.is_moe:
      (x, (cache, _)), sown = block.apply(own, x, inputs, ctx, routed, mutable=['intermediates'])
      experts += sown['intermediates']['moe']['expert_idx']
    else:
      x, (cache, _) = block.apply(own, x, inputs, ctx, routed)
    new.append(cache)
  return Decoded(x, tuple(new), jnp.stack(experts) if experts else None)


def prefill(
  cfg: schema.ModelConfig,
  weights: Weights,
  tokens: Array,
  length: Array,
  num_slots: int,
  *,
  keep_experts: bool = False,
) -> Decoded:
  """Applies the model to the beginnings of all rows.

  Args:
    cfg: the model.
    weights: see `unstack`.
    tokens: [B, L] int32, padded on the right.
    length: [B] int32, real tokens.
    num_slots: S, slots of each cache, at least L.
    keep_experts: return the chosen experts too.

  Returns:
    Decoded; cache slots after a row's last token hold values that are never read.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  segment_ids = (positions < length[:, None]).astype(jnp.int32)
  ctx = multi_head.Context(positions, segment_ids)
  out = _apply(cfg, weights, tokens, ctx, None, keep_experts)
  return out._replace(caches=jax.tree.map(lambda a: with_slots(a, num_slots), out.caches))


def with_slots(a: Array, num_slots: int) -> Array:
  """Entries [B, L, ...] of a cache, with room for more: [B, S, ...]."""
  return jnp.pad(a, [(0, 0), (0, num_slots - a.shape[1])] + [(0, 0)] * (a.ndim - 2))


def step(
  cfg: schema.ModelConfig,
  weights: Weights,
  tokens: Array,
  positions: Array,
  caches: Caches,
  *,
  keep_experts: bool = False,
) -> Decoded:
  """Applies the model to the next tokens of every row.

  Args:
    cfg: the model.
    weights: see `unstack`.
    tokens: [B, L] int32.
    positions: [B, L] int32, rising by one along a row; slots before the first are written.
    caches: of the tokens before; slots from `positions` on may hold anything.
    keep_experts: return the chosen experts too.

  Returns:
    Decoded; its caches hold the new tokens at their positions.
  """
  ctx = multi_head.Context(positions, jnp.ones_like(tokens))
  return _apply(cfg, weights, tokens, ctx, caches, keep_experts)
