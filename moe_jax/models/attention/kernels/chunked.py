"""Attention in memory linear in L: blocks of scores, and a softmax that is corrected as it goes.

FlashAttention (arXiv 2205.14135, 2307.08691) in plain JAX, for long rows where no kernel serves.
Forward keeps the log of each query's softmax sum; backward recomputes the scores from it, block by
block. Only blocks that a document reaches are computed: keys after the query's block, and keys
before the first document of the query's block, are never touched.

The tokens of a document are neighbours in order of position (see `reference.attend`), so that
'same document, not later in the row' is what a token sees, and every row sees at least itself.

Here L is the length of one block. The blocks, of the queries or of all keys of a row, are the first
axis of every array, [blocks, B, Nkv, ...].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import layers

Array = jax.Array

# Tokens per block. Of 64, 128, 256 and 512, on two CPU cores with gradients: the fastest for 8 rows
# of 512 tokens; within 30 % of the fastest (256 or 512) for rows of 2048 and 8192.
BLOCK = 128
HIDDEN = -1e30  # logit of a key that is not seen: finite, so that differences of it are too


class Rows(NamedTuple):
  """What decides who sees whom."""

  segment_ids: Array  # [blocks, B, L] int32, of the queries
  key_segment_ids: Array  # [blocks, B, L] int32
  offset: Array  # [] int32, place of the first query in the row
  first: Array  # [blocks] int32, first block of keys that some query of a block sees
  end: Array  # [blocks] int32, first block of keys that no query of a block sees any more


def attend(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  segment_ids: Array,
  scale: float,
  first: Array | int = 0,
) -> Array:
  """Causal grouped self-attention; arguments and result as in `reference.attend`."""
  del positions  # row order says the same
  length, num_kv_heads = q.shape[1], k.shape[2]
  block = min(BLOCK, length)
  q, k, v = (_split(a, num_kv_heads, block) for a in (q, k, v))
  rows = _rows(segment_ids, length, first, block)
  # Outside the custom VJP, so that a remat policy that saves them spares backward the forward.
  out, lse = _forward(*jax.lax.stop_gradient((q, k, v)), rows, scale)
  out, lse = (checkpoint_name(a, 'attn_out') for a in (out, lse))
  return _join(_with_gradients()(scale, q, k, v, rows, out, lse))[:, :length]


def _blocks(a: Array, block: int, fill: int = 0) -> Array:
  """[B, length, ...] -> [B, blocks, L, ...], filled up, with zeros as padding tokens have."""
  batch, length, *rest = a.shape
  more = [(0, 0), (0, -length % block), *[(0, 0)] * len(rest)]
  return jnp.pad(a, more, constant_values=fill).reshape(batch, -1, block, *rest)


def _split(a: Array, num_kv_heads: int, block: int) -> Array:
  """[B, length, N, H] -> [blocks, B, Nkv, G, L, H]."""
  a = _blocks(a, block)
  return a.reshape(*a.shape[:3], num_kv_heads, -1, a.shape[-1]).transpose(1, 0, 3, 4, 2, 5)


def _join(a: Array) -> Array:
  """[blocks, B, Nkv, G, L, H] -> [B, blocks L, N, H]."""
  chunks, batch, num_kv_heads, groups, block, h = a.shape
  return a.transpose(1, 0, 4, 2, 3, 5).reshape(batch, chunks * block, num_kv_heads * groups, h)


def _rows(segment_ids: Array, length: int, first: Array | int, block: int) -> Rows:
  """Of whole rows [B, S]; `length` queries from place `first` on."""
  total = segment_ids.shape[1]
  # A padding token needs nobody but itself. Row 0, which has none before it, is a start anyway.
  new = (segment_ids != jnp.roll(segment_ids, 1, axis=1)) | (segment_ids == 0)
  start = jax.lax.cummax(jnp.where(new, jnp.arange(total, dtype=jnp.int32), 0), axis=1)

  def own(a):
    return jax.lax.dynamic_slice_in_dim(a, first, length, axis=1)

  ids = _blocks(own(segment_ids), block)
  last = jnp.minimum(jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32) * block, length) - 1
  return Rows(
    segment_ids=ids.swapaxes(0, 1),
    key_segment_ids=_blocks(segment_ids, block).swapaxes(0, 1),
    offset=jnp.int32(first),
    first=_blocks(own(start), block, fill=total).min(axis=(0, 2)) // block,
    end=(first + last) // block + 1,
  )


def _scores(q: Array, k: Array, rows: Rows, i: Array, j: Array, scale: float) -> Array:
  """Logits [B, Nkv, G, L, S] float32 of the queries of block i and the keys of block j."""
  scores = jnp.einsum('BNGLH,BNSH->BNGLS', q, k, preferred_element_type=jnp.float32) * scale
  block = q.shape[-2]
  row = jnp.arange(block)
  seen = (rows.offset + i * block + row)[:, None] >= j * block + row
  seen &= rows.segment_ids[i][:, :, None] == rows.key_segment_ids[j][:, None, :]
  return jnp.where(seen[:, None, None], scores, HIDDEN)


def _forward(q: Array, k: Array, v: Array, rows: Rows, scale: float) -> tuple[Array, Array]:
  """(outputs [blocks, B, Nkv, G, L, Hv], logs of the softmax sums [blocks, B, Nkv, G, L])."""

  def query_block(args):
    i, qi, first, end = args

    def key_block(j, carry):
      out, total, top = carry
      scores = _scores(qi, k[j, :, :, 0], rows, i, j, scale)
      new_top = jnp.maximum(top, scores.max(axis=-1))
      probs = jnp.exp(scores - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      added = jnp.einsum(
        'BNGLS,BNSH->BNGLH',
        probs.astype(v.dtype),
        v[j, :, :, 0],
        preferred_element_type=jnp.float32,
      )
      return out * shrink[..., None] + added, total * shrink + probs.sum(axis=-1), new_top

    # What a query collects before the first key it sees, exp(0) each, is shrunk to 0 by that key.
    stat = jnp.zeros(qi.shape[:-1], jnp.float32)
    out = jnp.zeros((*stat.shape, v.shape[-1]), jnp.float32)
    carry = out, stat, jnp.full_like(stat, HIDDEN)
    out, total, top = jax.lax.fori_loop(first, end, key_block, carry)
    return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

  number = jnp.arange(len(q), dtype=jnp.int32)
  return jax.lax.map(query_block, (number, q, rows.first, rows.end))


def _backward(scale: float, residuals: tuple, d_out: Array) -> tuple:
  q, k, v, rows, out, lse = residuals
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def query_block(i, carry):
    qi, d_oi = q[i], d_out[i]

    def key_block(j, carry):
      d_qi, d_k, d_v = carry
      kj, vj = k[j, :, :, 0], v[j, :, :, 0]
      probs = jnp.exp(_scores(qi, kj, rows, i, j, scale) - lse[i][..., None])
      d_v = d_v.at[j].add(product('BNGLS,BNGLH->BNSH', probs.astype(v.dtype), d_oi))
      d_probs = product('BNGLH,BNSH->BNGLS', d_oi, vj)
      d_scores = (probs * (d_probs - delta[i][..., None]) * scale).astype(q.dtype)
      d_k = d_k.at[j].add(product('BNGLS,BNGLH->BNSH', d_scores, qi))
      return d_qi + product('BNGLS,BNSH->BNGLH', d_scores, kj), d_k, d_v

    d_q, d_k, d_v = carry
    init = jnp.zeros(qi.shape, jnp.float32), d_k, d_v
    d_qi, d_k, d_v = jax.lax.fori_loop(rows.first[i], rows.end[i], key_block, init)
    return d_q.at[i].set(d_qi.astype(q.dtype)), d_k, d_v

  def flat(a):
    return jnp.zeros(a[:, :, :, 0].shape, jnp.float32)

  d_q, d_k, d_v = jax.lax.fori_loop(0, len(q), query_block, (jnp.zeros_like(q), flat(k), flat(v)))
  d_k, d_v = d_k[:, :, :, None].astype(k.dtype), d_v[:, :, :, None].astype(v.dtype)
  return d_q, d_k, d_v, layers.no_gradient(rows), jnp.zeros_like(out), jnp.zeros_like(lse)


@functools.cache
def _with_gradients() -> Callable[..., Array]:
  """(scale, q, k, v, rows, out, lse) -> out, whose gradients are those of `_forward`."""

  def keep(scale, *args):
    return args[-2], args

  fn = jax.custom_vjp(lambda scale, *args: args[-2], nondiff_argnums=(0,))
  fn.defvjp(keep, _backward)
  return fn
