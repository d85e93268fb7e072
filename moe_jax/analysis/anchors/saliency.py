"""Where the loss depends on attention: I = |sum over heads of A * dL/dA| (arXiv 2305.14160, eq. 1).

The attention probabilities are multiplied by ones, and the gradient of these is A * dL/dA; one
array of ones for all heads of a layer gives their sum. L is the cross-entropy of the right label
word among the label words, at the last token. I(i, j) is the flow from token j to token i.

Axis letters: X layers, W label words.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import trees
from moe_jax.analysis.anchors import observed_model, prompts
from moe_jax.config import schema

Array = jax.Array


class Metrics(NamedTuple):
  """Means of the flow per layer and prompt, each [X, B] float32."""

  wp: prompts.Numbers  # S_wp, from all that comes before a label word to the label word
  pq: prompts.Numbers  # S_pq, from label words to the last token
  ww: prompts.Numbers  # S_ww, between all other tokens


def label_logits(logits: Array, target: Array, label_ids: Array) -> Array:
  """logits [B, L, V] at the last tokens [B], of label words [B, W] -> [B, W]."""
  last = jnp.take_along_axis(logits, target[:, None, None], axis=1)[:, 0]
  return jnp.take_along_axis(last, label_ids, axis=1)


def label_losses(logits: Array, batch: prompts.Batch) -> Array:
  """Cross-entropy of the right label word among the label words: logits [B, L, V] -> [B]."""
  log_probs = jax.nn.log_softmax(label_logits(logits, batch.target, batch.label_ids))
  return -jnp.take_along_axis(log_probs, batch.answer[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def flow(
  cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch, per_head: bool = False
) -> Array:
  """I of every prompt.

  Args:
    cfg: the model.
    variables: params and router_state.
    batch: the prompts.
    per_head: the variant, the sum over heads of |A * dL/dA|.

  Returns:
    [X, B, L, S] float32, 0 on the diagonal.
  """
  rows, length = batch.tokens.shape
  heads = cfg.num_heads if per_head else 1

  def loss(factors: Array) -> Array:
    found = observed_model.apply(cfg, variables, batch.tokens, batch.mask, {'factors': factors})
    return label_losses(found.logits, batch).sum()

  grad = jax.grad(loss)(jnp.ones((cfg.num_layers, rows, heads, length, length), jnp.float32))
  return jnp.abs(grad).sum(axis=2) * (1.0 - jnp.eye(length))


@jax.jit
def summarise(flow: Array, places: Array, target: Array) -> Metrics:
  """The three means of I.

  The pairs (i, j) are all with j < i <= q. S_ww has those that the others have not: q (q + 1) / 2
  less sum of p_k less C, of q, the last token, and C label words at p_k, all counted from 0.

  Args:
    flow: [X, B, L, S].
    places: [B, demonstrations] of the label words.
    target: [B] of the last tokens.
  """
  length = flow.shape[-1]
  i, j = jnp.arange(length)[:, None], jnp.arange(length)[None]
  before = (j < i) & (i <= target[:, None, None])  # [B, L, S]
  is_label = (jnp.arange(length) == places[..., None]).any(axis=1)  # [B, L]
  wp = before & is_label[:, :, None]
  pq = before & (i == target[:, None, None]) & is_label[:, None, :]
  ww = before & ~wp & ~pq

  def mean(mask: Array) -> Array:
    return (flow * mask).sum(axis=(2, 3)) / mask.sum(axis=(1, 2))

  return Metrics(*(mean(mask) for mask in (wp, pq, ww)))


def measure(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  batch: prompts.Batch,
  *,
  size: int,
  per_head: bool = False,
) -> Metrics:
  """The three means of all prompts of a batch, `size` of them at a time."""
  parts = []
  for begin in range(0, len(batch.tokens), size):
    part = batch.take(slice(begin, begin + size))
    found = flow(cfg, variables, part, per_head)
    parts.append(jax.device_get(summarise(found, part.places, part.target)))
  return Metrics(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts)))
