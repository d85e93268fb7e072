"""One decoder layer, x + attention(norm(x)), then x + ffn(norm(x)); and the stacks of layers."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax.balance import balance_losses, loss_scopes, router_stats
from moe_jax.config import router_traits, schema
from moe_jax.devices import partitioning
from moe_jax.models import layers, moe_layer
from moe_jax.models.attention import latent, multi_head
from moe_jax.models.routers import routing

Array = jax.Array


# Keys and values of one layer, or of a stack with a leading axis of layers.
LayerCache = multi_head.KVCache | latent.LatentCache


class LayerInputs(NamedTuple):
  """What a block gets besides residual stream and batch; leaves [layers, ...] in a stack."""

  cache: LayerCache | None  # None outside of decoding
  number: Array  # [] int32, number of the layer in the model
  slopes: Mapping[str, Any]  # see `loss_scopes.global_slopes`
  experts: Array | None = None  # [B, L, K] int32, choices to be taken over; None: the router's


class Stack(NamedTuple):
  """A run of blocks of one kind."""

  name: str  # of its parameters
  is_moe: bool
  first: int  # number of its first layer
  length: int


def stacks(cfg: schema.ModelConfig) -> list[Stack]:
  """The dense layers, then the MoE layers; a kind without layers is left out."""
  num_dense = cfg.num_layers - cfg.num_moe_layers
  kinds = (
    Stack('dense_layers', False, 0, num_dense),
    Stack('moe_layers', True, num_dense, cfg.num_moe_layers),
  )
  return [kind for kind in kinds if kind.length]


def staged(cfg: schema.ModelConfig) -> Stack:
  """The layers that the stages of a pipeline share: the MoE layers, or all of a dense model."""
  return stacks(cfg)[-1]


class LayerTypes(NamedTuple):
  """The classes of a block's layers; decoding has its own, with weights in another layout."""

  attention: type[multi_head.Attention] = multi_head.Attention
  latent_attention: type[latent.MLA] = latent.MLA
  feed_forward: type[layers.FeedForward] = layers.FeedForward
  moe: type[moe_layer.MoE] = moe_layer.MoE


class Block(nn.Module):
  """One layer; the scan's carry is the residual stream, its scanned inputs are the layer's own."""

  cfg: schema.ModelConfig
  is_moe: bool
  train: bool
  keep_cache: bool = False  # return the keys and values of this call although it has no cache
  types: LayerTypes = LayerTypes()

  @nn.compact
  def __call__(self, x: Array, own: LayerInputs, ctx: multi_head.Context, tokens: routing.Tokens):
    """x [B, L, D] -> (x, (cache, RouterStats or None))."""
    cfg = self.cfg
    dtypes: dict[str, Any] = dict(
      dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.dtype(cfg.param_dtype)
    )
    norm = functools.partial(layers.RMSNorm, cfg.norm_eps, dtypes['dtype'])
    x = checkpoint_name(x, 'layer_in')
    attn = self._attention(dtypes)
    with jax.named_scope('attention'):
      update, cache, mixture = attn(norm(name='attention_norm')(x), ctx, own.cache)
    x = partitioning.constrain(x + update, 'act_batch', 'act_len', 'act_embed')
    u = norm(name='ffn_norm')(x)
    if self.is_moe:
      sizes = routing.Sizes(cfg.vocab_size, cfg.max_seq_len)
      layer = self.types.moe(cfg.moe, sizes, cfg.init_std, train=self.train, name='moe', **dtypes)
      update, stats = layer(u, tokens, own.number, own.slopes, own.experts)
      stats = self._add_mixture(stats, mixture, own.slopes)
    else:
      update = self.types.feed_forward(cfg.mlp_dim, cfg.init_std, name='mlp', **dtypes)(u)
      stats = None
    x = partitioning.constrain(x + update, 'act_batch', 'act_len', 'act_embed')
    return x, (cache if self.keep_cache or own.cache is not None else None, stats)

  def _attention(self, dtypes: Mapping[str, Any]) -> nn.Module:
    cfg = self.cfg
    sizes = (cfg.attention, cfg.num_heads, cfg.init_std)
    if cfg.attention.kind == 'mla':
      return self.types.latent_attention(*sizes, name='attention', **dtypes)
    threshold = self._attention_threshold()
    return self.types.attention(*sizes, threshold=threshold, name='attention', **dtypes)

  def _attention_threshold(self) -> float:
    """Score below which attention experts are left out; 0 in training and in dense models."""
    moe = self.cfg.moe
    pruned = self.cfg.is_moe and not self.train
    return router_traits.of(moe).attention_threshold(moe) if pruned else 0.0

  def _add_mixture(self, stats, mixture, slopes):
    """Adds the mixture of attention heads to the layer's statistics."""
    if stats is None or mixture is None:
      return stats
    name = 'attention_mutual_information'
    scope = self.cfg.moe.loss(name).scope
    loss = loss_scopes.scoped(
      balance_losses.mutual_information, self.cfg.moe, scope, mixture, slopes.get(name)
    )
    return stats.replace(
      losses={**stats.losses, name: loss}, attention=router_stats.add_up(mixture)
    )


class PaddedBlock(Block):
  """A layer, or nothing where its number is negative: stages of unequal length have such places."""

  def __call__(self, x: Array, own: LayerInputs, ctx: multi_head.Context, tokens: routing.Tokens):
    """As `Block`; without a layer x is handed on, and the statistics are of no layer."""
    out, found = super().__call__(x, own, ctx, tokens)
    return jnp.where(own.number < 0, x, out), found
