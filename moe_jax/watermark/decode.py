"""Reads messages from text, without the model that wrote it.

In which divisions of its place every token is available is computed once, [places, Z]; the hits of
all messages are gathered from that. Places with the same tokens before have the same divisions,
so their hits are added first.

How sure a message is: divisions of a message are random, so that under "this text does not carry
it" its hits are a sum of independent draws, one for each group of places with the same tokens
before, from what was counted there. The tail of that sum is exact for any text, repetitions and
certain tokens included; where all places differ and half of all divisions are hit, it is the tail
of a binomial. Times the number of messages it bounds the probability that some message has as many:
of a chunk 2^bits, where the first chunk of a message may have fewer bits than the others.

Axis letters: W tokens before, Z divisions.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.inference import cached_model
from moe_jax.watermark import encode, partition, proxy

Array = jax.Array

_PIECE = 64  # places that are looked at together
_GROUPS = 64  # distinct beginnings are padded to multiples of it, to compile rarely


class Hits(NamedTuple):
  """What a text holds at every place from the `window`-th token on."""

  seeds: np.ndarray  # [places] uint32, of the tokens before
  found: np.ndarray  # [places, Z] bool, whether the token is available


class Chunk(NamedTuple):
  """What a piece of text says."""

  value: int  # the message with the most hits
  hits: int
  places: int
  runner_up: int  # hits of the next best message
  p_value: float  # at most how often a text without a mark has so many hits for any message

  @property
  def confidence(self) -> float:
    """1 - p_value."""
    return 1 - self.p_value


class Found(NamedTuple):
  """A message somewhere in a text."""

  start: int  # its first token; the first `window` are its context
  message: int
  chunks: tuple[Chunk, ...]
  p_value: float  # corrected for the number of places that were tried


def look(
  scheme: partition.Scheme, known: proxy.Proxy | None, ids: Sequence[int], vocab_size: int
) -> Hits:
  """The hits of a text.

  Args:
    scheme: of the key.
    known: the proxy; None for a 'vanilla' scheme.
    ids: the text, without prompt and special tokens.
    vocab_size: V.

  Raises:
    errors.InputError: an id is not in the vocabulary; the proxy is missing.
  """
  encode.check_proxy(scheme, known)
  text = np.asarray(ids, np.int32)
  errors.require(
    text.size == 0 or (text.min() >= 0 and text.max() < vocab_size),
    f'the text holds an id outside of the vocabulary of {vocab_size}; it was encoded with another '
    'tokenizer',
  )
  num = max(len(text) - scheme.window, 0)
  seeds, found = [], []
  windows = text[np.arange(num)[:, None] + np.arange(scheme.window)]
  for first in range(0, num, _PIECE):
    rows = slice(first, min(first + _PIECE, num))
    fill = _PIECE - (rows.stop - rows.start)
    before = np.pad(windows[rows], ((0, fill), (0, 0)))
    tokens = np.pad(text[scheme.window :][rows], (0, fill))
    cfg, weights = known or (None, None)
    result = _look(
      weights,
      scheme.secret,
      before,
      tokens,
      scheme=scheme.divisions,
      cfg=cfg,
      vocab_size=vocab_size,
    )
    piece_seeds, piece_found = jax.device_get(result)
    seeds.append(piece_seeds[: _PIECE - fill])
    found.append(piece_found[: _PIECE - fill])
  empty = Hits(np.zeros(0, np.uint32), np.zeros((0, scheme.partitions), bool))
  return Hits(np.concatenate(seeds), np.concatenate(found)) if seeds else empty


@functools.partial(jax.jit, static_argnames=('scheme', 'cfg', 'vocab_size'))
def _look(
  weights: cached_model.Weights | None,
  secret: Array,
  before: Array,
  tokens: Array,
  *,
  scheme: partition.Scheme,
  cfg: schema.ModelConfig | None,
  vocab_size: int,
) -> tuple[Array, Array]:
  """ids before [places, W], tokens [places] -> (seeds [places], hits [places, Z])."""
  seeds = partition.prefix_seed(scheme, secret, before)
  if cfg is None:
    return seeds, jax.vmap(lambda s, t: partition.hits(scheme, s, t, vocab_size))(seeds, tokens)
  assert weights is not None
  probs = proxy.next_probs(cfg, weights, before)
  # One place after the other: all together would hold [places, Z, V].
  found = jax.lax.map(lambda each: partition.hits(scheme, *each), (seeds, tokens, probs))
  return seeds, found


def read(scheme: partition.Scheme, hits: Hits, number: int) -> Chunk:
  """The most likely chunk of a message in a piece of text, and how sure that is.

  Args:
    scheme: of the key.
    hits: of the places of one chunk, or of more or fewer.
    number: which chunk of the message it is, from 0 on: that says how many bits it has.
  """
  bits = scheme.bits_of(number)
  seeds, where = np.unique(hits.seeds, return_inverse=True)
  sums = np.zeros((len(seeds), scheme.partitions), np.int32)
  np.add.at(sums, where, hits.found.astype(np.int32))
  fill = -len(seeds) % _GROUPS
  rows = (np.pad(seeds, (0, fill)), np.pad(sums, ((0, fill), (0, 0))))
  best, count, second = (
    int(n) for n in _best(*rows, scheme=dataclasses.replace(scheme.divisions, chunk_bits=bits))
  )
  p_value = min(1.0, tail(sums, count) * 2**bits)
  return Chunk(best, count, len(hits.seeds), second, p_value)


@functools.partial(jax.jit, static_argnames='scheme')
def _best(seeds: Array, sums: Array, *, scheme: partition.Scheme) -> tuple[Array, Array, Array]:
  """seeds [groups], hits [groups, Z] -> (message with most hits, its hits, those of the next)."""
  messages = jnp.arange(2**scheme.chunk_bits, dtype=jnp.uint32)

  def add(group: Array, total: Array) -> Array:
    division = partition.division_of(scheme, seeds[group], messages)
    return total + sums[group].at[division].get(mode='promise_in_bounds')

  total = jax.lax.fori_loop(0, len(seeds), add, jnp.zeros(messages.shape, jnp.int32))
  best = total.argmax()
  others = jnp.where(messages == best.astype(jnp.uint32), -1, total)
  return best, total[best], others.max()


def tail(sums: np.ndarray, count: int) -> float:
  """P(a message that the text does not carry has at least `count` hits).

  Args:
    sums: [groups, Z], hits of the places with the same tokens before, in every division.
    count: hits.
  """
  distribution = np.ones(1)
  for row in sums:
    distribution = np.convolve(distribution, np.bincount(row) / len(row))
  return float(min(1.0, distribution[count:].sum()))


def read_all(scheme: partition.Scheme, hits: Hits) -> list[Chunk]:
  """Every whole chunk of a text, at most those of one message.

  Raises:
    errors.InputError: the text is shorter than one chunk.
  """
  size = scheme.chunk_tokens
  count = min(len(hits.seeds) // size, scheme.num_chunks)
  errors.require(
    count > 0,
    f'the text has {len(hits.seeds) + scheme.window if len(hits.seeds) else "too few"} tokens, but '
    f'a chunk of {scheme.chunk_bits} bits takes {scheme.window} + {size}; give a longer text, or '
    'the key that it was written with',
  )
  parts = (slice(n * size, (n + 1) * size) for n in range(count))
  return [read(scheme, Hits(hits.seeds[p], hits.found[p]), n) for n, p in enumerate(parts)]


def scan(
  scheme: partition.Scheme, hits: Hits, stride: int = 10, threshold: float = 0.99
) -> list[Found]:
  """The messages that stand anywhere in a text, in their order.

  Args:
    scheme: of the key.
    hits: of the text.
    stride: tokens from one try to the next; a chunk loses up to half of that on either side.
    threshold: confidence from which a message counts, corrected for the number of tries.

  Raises:
    errors.InputError: the text is shorter than a message.
  """
  length = scheme.num_chunks * scheme.chunk_tokens
  errors.require(
    len(hits.seeds) >= length,
    f'the text has fewer tokens than a message of {scheme.message_bits} bits, {scheme.num_tokens}; '
    'give a longer text, or the key that it was written with',
  )
  starts = [*range(0, len(hits.seeds) - length, stride), len(hits.seeds) - length]
  tried = []
  for start in starts:
    part = slice(start, start + length)
    chunks = tuple(read_all(scheme, Hits(hits.seeds[part], hits.found[part])))
    # All chunks must be there, so the worst of them speaks for the message.
    p_value = min(1.0, len(starts) * max(chunk.p_value for chunk in chunks))
    message = scheme.message([chunk.value for chunk in chunks])
    tried.append(Found(start, message, chunks, p_value))
  kept: list[Found] = []
  best_first = sorted(
    tried, key=lambda one: (math.log(one.p_value + 1e-300), -sum(c.hits for c in one.chunks))
  )
  for one in best_first:
    apart = all(abs(one.start - other.start) >= length - stride for other in kept)
    if one.p_value <= 1 - threshold and apart:
      kept.append(one)
  return sorted(kept, key=lambda one: one.start)
