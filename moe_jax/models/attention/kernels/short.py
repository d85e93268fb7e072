"""Attention of short rows on a CPU: blocks of queries, each against all keys up to its last one.

What it saves against `reference` (experiments/bench has the figures):

* Keys after a block's last query are left out, and no scores are kept: backward makes them again
  from the log of each query's softmax sum, as `chunked` does. There are few blocks, so they are
  written out, and no softmax needs to be corrected as it goes.
* Scores lie as [..., keys, queries]. A softmax then goes down the columns, adding vectors to
  vectors, where a sum along a row would add one number after the other. And all products contract
  the last axis of their left operand, the form that XLA's fast products on a CPU ask for; what that
  takes is transposes of the narrow arrays, with H columns, and none of scores.

Axes are [B, Nkv, S, G, L], L being the queries of one block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import layers

Array = jax.Array

BLOCK = 64  # queries; of 64, 128 and 256 the fastest with gradients, for rows of 64 to 256 tokens
HIDDEN = -1e30  # logit of a key that is not seen: finite, so that differences of it are too

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Saved(NamedTuple):
  """What backward finds; queries are scaled."""

  q: Array  # [B, Nkv, G, length, H]
  k: Array  # [B, Nkv, length, H]
  v: Array  # [B, Nkv, length, Hv]
  start: Array  # [B, length] int32, place in the row of the first key that a query sees
  out: Array  # [B, Nkv, Hv, G, length]
  lse: Array  # [B, Nkv, G, length] float32, log of the softmax sum


def attend(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  segment_ids: Array,
  scale: float,
  first: Array | int = 0,
) -> Array:
  """Causal grouped self-attention of whole rows; otherwise as `reference.attend`.

  Raises:
    ValueError: the queries are a part of the rows.
  """
  del positions, first  # row order says the same, and whole rows begin at their first place
  batch, length, num_heads, h = q.shape
  if length != k.shape[1]:
    raise ValueError(f'{length} queries of rows of {k.shape[1]} tokens: `short` needs whole rows')
  num_kv_heads = k.shape[2]
  q = (q * scale).reshape(batch, length, num_kv_heads, -1, h).transpose(0, 2, 3, 1, 4)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  start = _starts(segment_ids)
  # Outside the custom VJP, so that a remat policy that saves them spares backward the forward.
  out, lse = _forward(*jax.lax.stop_gradient((q, k, v)), start)
  out, lse = (checkpoint_name(a, 'attn_out') for a in (out, lse))
  out = _with_gradients()(_Saved(q, k, v, start, out, lse))
  return out.transpose(0, 4, 1, 3, 2).reshape(batch, length, num_heads, -1)


def _starts(segment_ids: Array) -> Array:
  """Of every token the place of its document's first one, [B, length]; padding sees itself."""
  new = (segment_ids != jnp.roll(segment_ids, 1, axis=1)) | (segment_ids == 0)
  place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(new, place, 0), axis=1)  # place 0 is a start anyway


def _blocks(length: int) -> list[tuple[int, int]]:
  """First and end of each block of queries."""
  return [(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]


def _transposed(a: Array) -> Array:
  """[B, Nkv, length, H] -> [B, Nkv, H, length], in memory.

  Without the barrier XLA would read the array through strides inside of a slower product.
  """
  return jax.lax.optimization_barrier(a.swapaxes(2, 3))


def _scores(q: Array, k: Array, start: Array, first: int) -> Array:
  """Logits [B, Nkv, S, G, L] float32 of queries from place `first` on and the S keys up to them."""
  key = jnp.arange(k.shape[2], dtype=jnp.int32)[:, None]
  own = jnp.arange(first, k.shape[2], dtype=jnp.int32)
  seen = (key >= start[:, None, :]) & (key <= own)
  return jnp.where(seen[:, None, :, None], _product('BNSH,BNGLH->BNSGL', k, q), HIDDEN)


def _forward(q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
  """(`_Saved.out`, `_Saved.lse`)."""
  v_t, outs, logs = _transposed(v), [], []
  for first, end in _blocks(k.shape[2]):
    scores = _scores(q[..., first:end, :], k[:, :, :end], start[:, first:end], first)
    top = scores.max(axis=2, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    summed = _product('BNHS,BNSGL->BNHGL', v_t[..., :end], weights.astype(v.dtype))
    outs.append((summed / total).astype(v.dtype))
    logs.append((top + jnp.log(total))[:, :, 0])
  return jnp.concatenate(outs, axis=-1), jnp.concatenate(logs, axis=-1)


def _backward(saved: _Saved, d_out: Array) -> tuple[_Saved]:
  q, k, v, start, out, lse = saved
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=2)
  d_out = jax.lax.optimization_barrier(jnp.moveaxis(d_out, 2, -1))  # [B, Nkv, G, length, Hv]
  k_t, d_qs = _transposed(k), []
  d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

  def up_to(end: int, part: Array) -> Array:
    """The gradients of all keys from those of the keys before `end`."""
    return jnp.pad(part, [(0, 0), (0, 0), (0, k.shape[2] - end), (0, 0)])

  for first, end in _blocks(k.shape[2]):
    here = slice(first, end)
    own, d_own = q[..., here, :], d_out[..., here, :]
    scores = _scores(own, k[:, :, :end], start[:, here], first)
    probs = jnp.exp(scores - lse[:, :, None, :, here])
    d_probs = _product('BNSH,BNGLH->BNSGL', v[:, :, :end], d_own)
    d_scores = (probs * (d_probs - delta[:, :, None, :, here])).astype(q.dtype)
    d_v += up_to(end, _product('BNSGL,BNGLH->BNSH', probs.astype(v.dtype), d_own))
    d_k += up_to(end, _product('BNSGL,BNGLH->BNSH', d_scores, own))
    d_qs.append(_product('BNHS,BNSGL->BNHGL', k_t[..., :end], d_scores).astype(q.dtype))
  d_q = jnp.moveaxis(jnp.concatenate(d_qs, axis=-1), 2, -1)
  d_k, d_v = d_k.astype(k.dtype), d_v.astype(v.dtype)
  no_gradient = layers.no_gradient(start)
  return (_Saved(d_q, d_k, d_v, no_gradient, jnp.zeros_like(out), jnp.zeros_like(lse)),)


@functools.cache
def _with_gradients() -> Callable[[_Saved], Array]:
  """_Saved -> its `out`, whose gradients are those of `_forward`."""
  fn = jax.custom_vjp(lambda saved: saved.out)
  fn.defvjp(lambda saved: (saved.out, saved), _backward)
  return fn
