"""Attention layers whose probabilities can be seen and changed: a reference for experiments.

The layers of `multi_head` and `latent` (in its expanded form) with the core of
`kernels.reference`: all probabilities of a row at once. They are sown into collection
`intermediates`, with the queries and keys they are made of. What collection `CONTROL` holds of a
layer changes them:

  factors   [B, 1 or N, L, S] float32, times the probabilities behind the softmax; nothing is
            normalised again (Label Words are Anchors, arXiv 2305.14160, section 4)
  hidden    [B, L, S] bool, keys that a query does not see: the others share its weight (section 2)

Without the collection the layers compute what those of a model do, see the test. A Transformer has
them as its `types`, see `analysis.anchors.observed_model`, with leaves [layers, ...] in the
collection of each stack.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config import attention_config
from moe_jax.models.attention import latent, multi_head
from moe_jax.models.attention.kernels import reference, sharded

Array = jax.Array

CONTROL = 'attention_control'  # the collection, and the name of a layer's entry in it
PROBS, QUERIES, KEYS = 'attention_probs', 'attention_queries', 'attention_keys'  # sown


def attend(
  module: Any,
  cfg: attention_config.AttentionConfig,
  q: Array,
  source: sharded.Source,
  ctx: multi_head.Context,
  v_head_dim: int,
) -> Array:
  """`multi_head.attend_own` by the reference alone, on one device, observed and controlled.

  Args:
    module: the layer, which has the collections.
    cfg: scale.
    q: [B, L, N, H].
    source: of keys [B, L, Nkv, H] and values [B, L, Nkv, Hv].
    ctx: which tokens see each other.
    v_head_dim: Hv.

  Returns:
    [B, L, N, Hv].
  """
  k, v = source.make(*source.arrays, *source.weights)
  control = {}
  if module.has_variable(CONTROL, CONTROL):
    control = module.get_variable(CONTROL, CONTROL)
  mask = reference.visible(ctx.positions, ctx.segment_ids, ctx.positions, ctx.segment_ids)
  if 'hidden' in control:
    mask &= ~control['hidden']
  probs = probabilities(q, k, mask, cfg.softmax_scale)
  module.sow('intermediates', PROBS, probs)
  module.sow('intermediates', QUERIES, q)
  module.sow('intermediates', KEYS, k)
  if 'factors' in control:
    probs *= control['factors']
  batch, length, num_heads, _ = q.shape
  grouped = probs.reshape(batch, k.shape[2], -1, *probs.shape[2:]).astype(v.dtype)
  out = jnp.einsum('BNGLS,BSNH->BLNGH', grouped, v)
  return out.reshape(batch, length, num_heads, v_head_dim)


def probabilities(q: Array, k: Array, mask: Array, scale: float) -> Array:
  """Softmax of the scaled products under a mask, in float32.

  Args:
    q: [B, L, N, H]; N = Nkv * G, the G query heads of one key-value head are neighbours.
    k: [B, S, Nkv, H].
    mask: [B, L, S] bool.
    scale: multiplies the logits.

  Returns:
    [B, N, L, S] float32; a query that sees no key sees all of them alike.
  """
  batch, length, num_heads, _ = q.shape
  grouped = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], -1)
  scores = jnp.einsum('BLNGH,BSNH->BNGLS', grouped, k, preferred_element_type=jnp.float32) * scale
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(scores, axis=-1).reshape(batch, num_heads, length, -1)


class Attention(multi_head.Attention):
  """`multi_head.Attention`, observed."""

  attend: ClassVar[Callable[..., Array]] = staticmethod(attend)


class MLA(latent.MLA):
  """`latent.MLA`, observed."""

  attend: ClassVar[Callable[..., Array]] = staticmethod(attend)
