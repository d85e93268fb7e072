"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Modules behind the last layer see one, two, ... tokens more and predict the one after; they train
only, unless they draft for the model when text is generated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.balance import router_stats
from moe_jax.config import schema
from moe_jax.models import decoder_block, layers
from moe_jax.models.attention import multi_head
from moe_jax.models.routers import routing

Array = jax.Array


class Predicted(NamedTuple):
  """What the M modules of multi-token prediction say."""

  logits: Array  # [M, B, L, V] float32
  normed: Array  # [M, B, L, D], what the head is applied to
  targets: Array  # [M, B, L] int32, the token that depth k predicts, k + 1 ahead; -1 = none
  stats: router_stats.RouterStats | None  # leaves [M, ...]


class Ahead(NamedTuple):
  """What a module of multi-token prediction gets besides; leaves [M, ...] in a scan."""

  embedded: Array  # [B, L, D], embedding of the token that its depth sees more
  ids: Array  # [B, L] int32, that token; 0 where the document has ended
  mask: Array  # [B, L] bool, whether the document goes on that far


class MTPLayer(nn.Module):
  """One depth of multi-token prediction: h' = M [norm(Emb(t_{i+k})); norm(h)], then a block.

  DeepSeek-V3, Eq. 21-23; the embedding comes first, as in the released weights and unlike in the
  formula. h of depth 1 is the model's last state behind its final norm, as transformers and vLLM
  hand it to the released module (the report does not say); that of depth k + 1 is what the block of
  depth k returns.
  """

  cfg: schema.ModelConfig
  is_moe: bool
  train: bool
  keep_cache: bool = False

  @nn.compact
  def __call__(
    self,
    hidden: Array,
    own: decoder_block.LayerInputs,
    ahead: Ahead,
    ctx: multi_head.Context,
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
    block = decoder_block.Block(cfg, self.is_moe, self.train, self.keep_cache, name='block')
    x, (cache, stats) = block(x, own, ctx, tokens)
    return x, (norm(name='norm')(x), cache, stats)


def tokens_ahead(
  tokens: Array, targets: Array, segment_ids: Array, num: int
) -> tuple[Array, Array]:
  """(seen, aims) of depths 1 to `num`, each [num, B, L] int32, -1 = none.

  Depth k sees the k-th token after each, whether it is learned or not (a prompt has no targets),
  and aims at the one behind it, if that is learned. None where the document has ended; behind the
  row's last token only its target is known.

  Args:
    tokens: [B, L] int32.
    targets: [B, L] int32, the token after each, -1 where it is not learned or there is none.
    segment_ids: [B, L] int32, documents; 0 = padding.
    num: how many depths.
  """

  def behind(values: Array) -> Array:
    """What stands one place further in the same document, -1 = nothing."""
    later = jnp.pad(values[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    same = segment_ids == jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(same & (segment_ids > 0), later, -1)

  seen = [jnp.where(targets >= 0, targets, behind(tokens))]
  aims = [behind(targets)]
  for _ in range(num - 1):
    seen.append(behind(seen[-1]))
    aims.append(behind(aims[-1]))
  return jnp.stack(seen), jnp.stack(aims)
