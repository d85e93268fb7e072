"""Demonstrations as a cache of few tokens: hidden anchors (arXiv 2305.14160, section 5).

The model reads the demonstrations once; of its cache the entries of label words and formatting
tokens are kept, in every layer, and the query is read behind them. An entry is what a layer caches:
keys and values, or with latent attention the latent and the rotated key.

Slot i of a cache belongs to position i, and kept entries move to the first slots. So that the
distances to the query stay what they were, their rotated keys are turned back by as many positions
as the query moves; products of queries and keys depend on distances only. This is the offset to
original positions of the paper's code for GPT-J. Without it (`keep_distances=False`) the query
stands directly behind the kept entries, as for GPT-2.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.anchors import blocking, prompts
from moe_jax.config import attention_config, schema
from moe_jax.inference import cached_model
from moe_jax.models import decoder_block
from moe_jax.models.attention import latent, rope

Array = jax.Array


class Compressed(NamedTuple):
  """Caches of the kept tokens."""

  caches: cached_model.Caches  # [B, S, ...], S the most that a row keeps
  count: Array  # [B] int32, kept entries of each row


def demonstrations(batch: prompts.Batch) -> np.ndarray:
  """[B, L] bool, the tokens before the query."""
  return np.arange(batch.tokens.shape[1]) < batch.start[:, None]


def anchors(batch: prompts.Batch) -> np.ndarray:
  """[B, L] bool, label words and formatting tokens of the demonstrations."""
  return demonstrations(batch) & (batch.kinds != prompts.TEXT)


def labels_only(batch: prompts.Batch) -> np.ndarray:
  """[B, L] bool, label words of the demonstrations."""
  return demonstrations(batch) & (batch.kinds == prompts.LABEL)


def random_words(batch: prompts.Batch, rng: np.random.Generator) -> np.ndarray:
  """[B, L] bool, formatting tokens and as many tokens of texts as there are label tokens."""
  here = demonstrations(batch)
  kept = here & (batch.kinds == prompts.FORMAT)
  texts, labels = here & (batch.kinds == prompts.TEXT), labels_only(batch)
  for row, count in enumerate(labels.sum(axis=1)):
    (places,) = texts[row].nonzero()
    kept[row, rng.permutation(places)[:count]] = True
  return kept


def without(batch: prompts.Batch, dropped: np.ndarray) -> prompts.Batch:
  """The prompts as if some tokens [B, L] bool, no label words among them, were not there."""
  kept = batch.mask & ~dropped
  moved = np.cumsum(kept, axis=1) - kept  # kept tokens before each place
  order = np.argsort(~kept, axis=1, kind='stable')
  mask = np.arange(kept.shape[1]) < kept.sum(axis=1)[:, None]

  def at(places: np.ndarray) -> np.ndarray:
    whole = np.take_along_axis(moved, places.reshape(len(kept), -1), axis=1)
    return whole.reshape(places.shape).astype(np.int32)

  def packed(array: np.ndarray, fill: int) -> np.ndarray:
    return np.where(mask, np.take_along_axis(array, order, axis=1), fill).astype(np.int32)

  return batch._replace(
    tokens=packed(batch.tokens, 0),
    mask=mask,
    kinds=packed(batch.kinds, -1),
    places=at(batch.places),
    start=at(batch.start),
    target=at(batch.target),
  )


def turned(keys: Array, delta: Array, cfg: attention_config.RopeConfig) -> Array:
  """Rotated keys of later or earlier positions: [B, S, ..., H] moved by delta [B]."""
  dim = keys.shape[-1]
  angle = delta.astype(jnp.float32)[:, None] * rope.inv_freq(dim, cfg)
  angle = angle.reshape(len(delta), *(1,) * (keys.ndim - 2), dim // 2)
  a, b = jnp.split(keys.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(keys.dtype)


def compress(
  cfg: schema.ModelConfig,
  caches: cached_model.Caches,
  kept: Array,
  start: Array,
  num_kept: int,
  keep_distances: bool = True,
) -> Compressed:
  """Keeps some entries of a cache, in order.

  Args:
    cfg: the model.
    caches: [B, S, ...] of each layer.
    kept: [B, S] bool.
    start: [B] int32, position of the query that follows.
    num_kept: slots of the result, at least the most entries that a row keeps.
    keep_distances: see the module.
  """
  order = jnp.argsort(~kept, axis=1, stable=True)[:, :num_kept]
  count = kept.sum(axis=1, dtype=jnp.int32)

  def gathered(a: Array) -> Array:
    return jnp.take_along_axis(a, order.reshape(*order.shape, *(1,) * (a.ndim - 2)), axis=1)

  def moved(keys: Array) -> Array:
    return turned(keys, count - start, cfg.attention.rope) if keep_distances else keys

  def layer(cache: decoder_block.LayerCache) -> decoder_block.LayerCache:
    own = jax.tree.map(gathered, cache)
    if isinstance(own, latent.LatentCache):
      return own._replace(rope_key=moved(own.rope_key))
    return own._replace(key=moved(own.key))

  return Compressed(tuple(map(layer, caches)), count)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _compressed(cfg, weights, batch, kept, num_kept, keep_distances):
  slots = batch.tokens.shape[1]
  caches = cached_model.prefill(cfg, weights, batch.tokens, batch.start, slots).caches
  return compress(cfg, caches, kept, batch.start, num_kept, keep_distances)


@functools.partial(jax.jit, static_argnums=0)
def _ask(cfg, weights, batch, found: Compressed, queries) -> blocking.Predictions:
  length = queries.shape[1]
  slots = found.caches[0][0].shape[1] + length
  caches = jax.tree.map(lambda a: cached_model.with_slots(a, slots), found.caches)
  positions = found.count[:, None] + jnp.arange(length, dtype=jnp.int32)
  hidden = cached_model.step(cfg, weights, queries, positions, caches).hidden
  last = jnp.take_along_axis(hidden, (batch.target - batch.start)[:, None, None], axis=1)
  return blocking.predictions_at(cached_model.logits_of(cfg, weights, last)[:, 0], batch.label_ids)


@functools.partial(jax.jit, static_argnums=0)
def _read_whole(cfg, weights, batch) -> blocking.Predictions:
  slots = batch.tokens.shape[1]
  hidden = cached_model.prefill(cfg, weights, batch.tokens, batch.target + 1, slots).hidden
  last = jnp.take_along_axis(hidden, batch.target[:, None, None], axis=1)
  return blocking.predictions_at(cached_model.logits_of(cfg, weights, last)[:, 0], batch.label_ids)


def query_tokens(batch: prompts.Batch) -> np.ndarray:
  """The tokens of the queries alone, padded on the right: [B, longest query] int32."""
  lengths = batch.target - batch.start + 1
  places = batch.start[:, None] + np.arange(lengths.max())
  places = np.minimum(places, batch.tokens.shape[1] - 1)
  return np.take_along_axis(batch.tokens, places, axis=1)


def predict(
  cfg: schema.ModelConfig,
  weights: cached_model.Weights,
  batch: prompts.Batch,
  kept: np.ndarray,
  *,
  size: int,
  keep_distances: bool = True,
) -> blocking.Predictions:
  """Predictions behind the kept tokens of the demonstrations, `size` prompts at a time.

  Args:
    cfg: the model.
    weights: of `cached_model.unstack`.
    batch: the prompts.
    kept: [B, L] bool, none of the query.
    size: prompts at a time.
    keep_distances: see the module.
  """
  num_kept, queries = int(kept.sum(axis=1).max()), query_tokens(batch)
  parts = []
  for begin in range(0, len(batch.tokens), size):
    rows = slice(begin, begin + size)
    part = batch.take(rows)
    found = _compressed(cfg, weights, part, kept[rows], num_kept, keep_distances)
    parts.append(jax.device_get(_ask(cfg, weights, part, found, queries[rows])))
  return blocking.Predictions(*(np.concatenate(arrays) for arrays in zip(*parts)))


class Seconds(NamedTuple):
  """Time of one batch of queries, the median of `repeats`."""

  whole: float  # demonstrations and query read together, as without any cache
  cached: float  # the query behind the whole cache
  compressed: float  # the query behind the kept entries


def measure_seconds(
  cfg: schema.ModelConfig,
  weights: cached_model.Weights,
  batch: prompts.Batch,
  repeats: int = 9,
) -> Seconds:
  """Times the queries of a batch, compiled beforehand."""
  queries, kept = query_tokens(batch), anchors(batch)
  whole = demonstrations(batch)
  full, some = (
    _compressed(cfg, weights, batch, mask, int(mask.sum(axis=1).max()), True)
    for mask in (whole, kept)
  )
  calls = (
    functools.partial(_read_whole, cfg, weights, batch),
    functools.partial(_ask, cfg, weights, batch, full, queries),
    functools.partial(_ask, cfg, weights, batch, some, queries),
  )
  return Seconds(*(_median(call, repeats) for call in calls))


def _median(call: Callable[[], object], repeats: int) -> float:
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - begin)
  return float(np.median(times))
