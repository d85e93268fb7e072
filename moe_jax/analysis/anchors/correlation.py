"""How well attention from the last token to the label words tells the prediction (section 2.3).

AUCROC_l is the area under the ROC curve of layer l's attention, summed over heads, as a score of
the label word that the model predicts; R_l its excess over chance, summed up to layer l, as a share
of the sum over all layers.

Axis letters: X layers, W label words.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from moe_jax import trees
from moe_jax.analysis.anchors import observed_model, prompts
from moe_jax.config import schema


@functools.partial(jax.jit, static_argnums=0)
def _attention(cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch):
  probs = observed_model.apply(cfg, variables, batch.tokens, batch.mask).probs.sum(axis=2)
  rows = jnp.arange(len(batch.tokens))[:, None]
  at_labels = probs[:, rows, batch.target[:, None], batch.places]  # [X, B, demonstrations]
  same = batch.classes[..., None] == jnp.arange(batch.label_ids.shape[1])
  return (at_labels[..., None] * same).sum(axis=2)


def scores(
  cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch, *, size: int
) -> np.ndarray:
  """Attention from the last token to the label words: [X, B, W], of each prompt summing to 1.

  Demonstrations of one class are summed.
  """
  parts = []
  for begin in range(0, len(batch.tokens), size):
    part = batch.take(slice(begin, begin + size))
    parts.append(np.asarray(_attention(cfg, variables, part)))
  found = np.concatenate(parts, axis=1)
  return found / found.sum(axis=-1, keepdims=True)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """The share of pairs in which the positive one scores higher, ties half (Mann-Whitney)."""
  ranks = stats.rankdata(np.concatenate([positive, negative]))
  count = len(positive)
  above = ranks[:count].sum() - count * (count + 1) / 2
  return float(above / (count * len(negative)))


def multiclass_auc(scores: np.ndarray, labels: np.ndarray) -> float:
  """One-vs-one AUC, the mean over pairs of classes and both directions.

  Classes that are no label are left out; of two that are left, the second's score decides. NaN if
  there is one label only.

  Args:
    scores: [B, W].
    labels: [B] int.
  """
  classes = np.unique(labels)
  if len(classes) < 2:
    return float('nan')
  kept = scores[:, classes]
  kept = kept / np.maximum(kept.sum(axis=1, keepdims=True), 1e-30)
  if len(classes) == 2:
    return auc(kept[labels == classes[1], 1], kept[labels == classes[0], 1])
  found = []
  for a, b in itertools.permutations(range(len(classes)), 2):
    found.append(auc(kept[labels == classes[a], a], kept[labels == classes[b], a]))
  return float(np.mean(found))


def cumulative(aucs: np.ndarray) -> np.ndarray:
  """R_l of AUCROC [X]: [X], 1 in the last layer; NaN where all layers together are at chance."""
  excess = np.cumsum(aucs - 0.5)
  return excess / (excess[-1] or np.nan)
