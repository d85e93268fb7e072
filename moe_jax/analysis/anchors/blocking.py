"""Label words isolated in some layers: they attend to themselves alone (arXiv 2305.14160, 2.2).

The keys before a blocked token are hidden before the softmax, so that the token's own key gets all
of its weight; nothing is set to zero behind it. Loyalty is agreement with the same prompts
unblocked: of the predicted label word, and of the five likeliest words (Jaccard).

Axis letters: X layers, W label words.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import trees
from moe_jax.analysis.anchors import observed_model, prompts
from moe_jax.config import schema

Array = jax.Array
TOP = 5  # words whose agreement is the word loyalty


class Predictions(NamedTuple):
  """What a model says behind prompts."""

  label: prompts.Numbers  # [B] int32, likeliest label word
  words: prompts.Numbers  # [B, TOP] int32, likeliest tokens of all
  log_probs: prompts.Numbers  # [B, W] float32, among the label words

  def accuracy(self, batch: prompts.Batch) -> np.ndarray:
    """[B] float, 1 where the label word is right."""
    return (self.label == batch.answer).astype(np.float64)


def predictions_of(logits: Array, batch: prompts.Batch) -> Predictions:
  """logits [B, L, V] of a batch -> Predictions, as arrays on the device."""
  last = jnp.take_along_axis(logits, batch.target[:, None, None], axis=1)[:, 0]
  return predictions_at(last, batch.label_ids)


def predictions_at(last: Array, label_ids: Array) -> Predictions:
  """The same from logits [B, V] of the last tokens, label words [B, W]."""
  among = jnp.take_along_axis(last, label_ids, axis=1)
  _, words = jax.lax.top_k(last, TOP)
  label = among.argmax(axis=1).astype(jnp.int32)
  return Predictions(label, words.astype(jnp.int32), jax.nn.log_softmax(among))


@functools.partial(jax.jit, static_argnums=0)
def _predict(
  cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch, control: Any
) -> Predictions:
  found = observed_model.apply(cfg, variables, batch.tokens, batch.mask, control)
  return predictions_of(found.logits, batch)


def predict(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  batch: prompts.Batch,
  *,
  size: int,
  hidden: Any = None,
) -> Predictions:
  """Predictions behind all prompts, `size` at a time.

  Args:
    cfg: the model.
    variables: params and router_state.
    batch: the prompts.
    size: prompts at a time.
    hidden: slice -> [X, rows, L, S] bool of these prompts, see `observed`; None hides nothing.
  """
  parts = []
  for begin in range(0, len(batch.tokens), size):
    rows = slice(begin, begin + size)
    control = {} if hidden is None else {'hidden': hidden(rows)}
    parts.append(jax.device_get(_predict(cfg, variables, batch.take(rows), control)))
  return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts)))


def isolated(places: np.ndarray, length: int) -> np.ndarray:
  """Hides all earlier keys from tokens: places [B, words], -1 for none -> [B, L, S] bool."""
  chosen = (np.arange(length) == places[..., None]).any(axis=-2)  # [..., B, L]
  return chosen[..., None] & np.tril(np.ones((length, length), bool), -1)


def hide_label_words(batch: prompts.Batch, layers: Sequence[int], num_layers: int) -> np.ndarray:
  """Every label word isolated in these layers: [X, B, L, S] bool."""
  rows, length = batch.tokens.shape
  hidden = np.zeros((num_layers, rows, length, length), bool)
  hidden[list(layers)] = isolated(batch.places, length)
  return hidden


def hide_random_words(
  batch: prompts.Batch, layers: Sequence[int], num_layers: int, rng: np.random.Generator
) -> np.ndarray:
  """As many other tokens isolated, drawn anew in every layer and prompt: [X, B, L, S] bool.

  They are drawn from all but the begin token and the label words, up to the text of the query.
  """
  rows, length = batch.tokens.shape
  hidden = np.zeros((num_layers, rows, length, length), bool)
  allowed = other_words(batch)
  for layer in layers:
    hidden[layer] = isolated(draw(allowed, batch.places.shape[1], rng), length)
  return hidden


def other_words(batch: prompts.Batch) -> np.ndarray:
  """[B, L] bool, tokens behind the first, of the text of the query at most, that are no label."""
  place = np.arange(batch.tokens.shape[1])
  last_text = np.where(batch.kinds == prompts.TEXT, place, 0).max(axis=1)
  return (place > 0) & (place <= last_text[:, None]) & (batch.kinds != prompts.LABEL)


def draw(allowed: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """Places of `count` random tokens of each row, all different: allowed [B, L] -> [B, count]."""
  keys = np.where(allowed, rng.random(allowed.shape), np.inf)
  places = np.argsort(keys, axis=1)[:, :count]
  enough = np.take_along_axis(allowed, places, axis=1)
  return np.where(enough, places, -1)


def label_loyalty(predictions: Predictions, whole: Predictions) -> np.ndarray:
  """[B] float, 1 where the predicted label word is that of the whole model."""
  return (predictions.label == whole.label).astype(np.float64)


def word_loyalty(predictions: Predictions, whole: Predictions) -> np.ndarray:
  """[B] float, Jaccard index of the five likeliest words and those of the whole model."""
  common = (predictions.words[:, :, None] == whole.words[:, None]).any(axis=2).sum(axis=1)
  return common / (2 * TOP - common)
