"""The readable reference: all scores of a row at once, [B, N, L, S], under a mask.

What short rows and decoding with a cache use, and what every other implementation is tested
against. Its memory grows with L squared.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array


def attend(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  segment_ids: Array,
  scale: float,
  first: Array | int = 0,
) -> Array:
  """Causal grouped self-attention over packed documents (arXiv 1706.03762, 3.2; 2305.13245).

  Args:
    q: [B, L, N, H], of the L tokens from place `first` of each row on; N = Nkv * G, the G query
      heads of one key-value head are neighbours.
    k: [B, S, Nkv, H], of whole rows.
    v: [B, S, Nkv, Hv]; Hv need not be H (MLA: 128 and 192).
    positions: [B, S] int32, position of each token inside its document.
    segment_ids: [B, S] int32, document of each token, 0 = padding. The tokens of a document are
      neighbours in order of position.
    scale: multiplies the logits.
    first: 0 where L = S; else this device has a part of the queries, see `sharded`.

  Returns:
    [B, L, N, Hv] in the dtype of v, named 'attn_out' for `jax.checkpoint` policies. Outputs of
    padding are finite and no loss reads them; they differ between implementations.
  """

  def own(a):
    return jax.lax.dynamic_slice_in_dim(a, first, q.shape[1], axis=1)

  mask = visible(own(positions), own(segment_ids), positions, segment_ids)
  return checkpoint_name(masked(q, k, v, mask, scale), 'attn_out')


def visible(
  positions: Array, segment_ids: Array, key_positions: Array, key_segment_ids: Array
) -> Array:
  """Which keys a query sees: those of its own document at or before its own position.

  Args:
    positions: [B, L] int32 of the queries.
    segment_ids: [B, L] int32 of the queries.
    key_positions: [B, S] int32.
    key_segment_ids: [B, S] int32, 0 for keys that nobody sees.

  Returns:
    [B, L, S] bool.
  """
  same = segment_ids[:, :, None] == key_segment_ids[:, None, :]
  causal = positions[:, :, None] >= key_positions[:, None, :]
  return same & causal & (key_segment_ids > 0)[:, None, :]


def masked(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
  """Grouped softmax attention under any mask, also with the keys of a cache; scores in float32.

  Args:
    q: [B, L, N, H]; N = Nkv * G, the G query heads of one key-value head are neighbours.
    k: [B, S, Nkv, H].
    v: [B, S, Nkv, Hv].
    mask: [B, L, S] bool.
    scale: multiplies the logits.

  Returns:
    [B, L, N, Hv] in the dtype of v. A query that sees no key gets the mean of the values.
  """
  batch, length, num_heads, _ = q.shape
  grouped = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], -1)
  scores = jnp.einsum('BLNGH,BSNH->BNGLS', grouped, k, preferred_element_type=jnp.float32) * scale
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BNGLS,BSNH->BLNGH', probs, v).reshape(batch, length, num_heads, -1)
