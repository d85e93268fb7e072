"""Which classes a model confuses, predicted from the keys of label words (arXiv 2305.14160, 6).

Queries of last tokens, of one deep layer and all heads in one vector, are centred; v_m are their
principal directions and sigma_m the standard deviations along them. A label word's key becomes
(sigma_m v_m . k), and classes whose keys are near each other are predicted to be confused:

  predicted(i, j) = |k_i - k_j| / the largest of such distances      0 = most confused
  measured(i, j)  = AUC of p_i / (p_i + p_j) over queries of classes i and j      1 = not confused

Axis letters: W label words, Y demonstrations, J width of all heads.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import trees
from moe_jax.analysis.anchors import correlation, observed_model, prompts
from moe_jax.config import schema

DIRECTIONS = 10  # M; the paper found 5 to 200 alike
DEPTH = 2 / 3  # of the layer that is looked at: 32 of 48 in the paper's code


class States(NamedTuple):
  """What one layer's attention is made of."""

  queries: np.ndarray  # [B, J], of the last tokens
  keys: np.ndarray  # [B, W, J], of label words, means over the demonstrations of a class


class Ratios(NamedTuple):
  """What tells two classes apart."""

  positive: np.ndarray  # of queries of the one class
  negative: np.ndarray  # of the other


def deep_layer(num_layers: int) -> int:
  """The layer that is looked at."""
  return min(int(DEPTH * num_layers), num_layers - 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _states(cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch, layer: int):
  found = observed_model.apply(cfg, variables, batch.tokens, batch.mask)
  q, k = found.queries[layer], found.keys[layer]
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)  # heads of a group share their key
  rows = len(batch.tokens)
  row = jnp.arange(rows)
  keys = k[row[:, None], batch.places].reshape(rows, batch.places.shape[1], -1)
  same = batch.classes[..., None] == jnp.arange(batch.label_ids.shape[1])
  means = jnp.einsum('BYJ,BYW->BWJ', keys, same / jnp.maximum(same.sum(axis=1, keepdims=True), 1))
  return q[row, batch.target].reshape(rows, -1), means


def states(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  batch: prompts.Batch,
  layer: int,
  *,
  size: int,
) -> States:
  """Queries and keys of one layer, `size` prompts at a time."""
  parts = []
  for begin in range(0, len(batch.tokens), size):
    part = batch.take(slice(begin, begin + size))
    parts.append(jax.device_get(_states(cfg, variables, part, layer)))
  return States(*(np.concatenate(arrays) for arrays in zip(*parts)))


def distances(queries: np.ndarray, keys: np.ndarray, directions: int = DIRECTIONS) -> np.ndarray:
  """Predicted confusion: queries [B, J], keys [W, J] -> [W, W], from 0 to 1, 0 on the diagonal."""
  centred = queries - queries.mean(axis=0)
  _, singular, axes = np.linalg.svd(centred, full_matrices=False)
  sigma = singular[:directions] / np.sqrt(len(queries))
  projected = keys @ axes[:directions].T * sigma
  found = np.linalg.norm(projected[:, None] - projected[None], axis=-1)
  return found / found.max()


def pair_ratios(log_probs: np.ndarray, answers: np.ndarray, i: int, j: int) -> Ratios:
  """log p_i - log p_j of the queries of either class.

  Args:
    log_probs: [B, W], among the label words.
    answers: [B] int, right label words.
    i: the one class.
    j: the other.
  """
  ratio = log_probs[:, i] - log_probs[:, j]
  return Ratios(ratio[answers == i], ratio[answers == j])


def pair_auc(sets: Sequence[Ratios]) -> float | None:
  """Measured: AUC of the one class against the other; None where no query is of one of them.

  Args:
    sets: of the same pair of classes, whose queries are taken together.
  """
  positive, negative = (np.concatenate(own) for own in zip(*sets))
  if not len(positive) or not len(negative):
    return None
  return correlation.auc(positive, negative)
