"""Anchor re-weighting: a factor per layer, head and label word on the last token's attention.

A^(q, p_k) = exp(beta) A(q, p_k) behind the softmax, without normalising again (arXiv 2305.14160,
section 4). A factor belongs to a label word, wherever its demonstration stands. The model is
frozen, beta starts at 0, and is trained on auxiliary examples behind the set's demonstrations, one
at a time. The rows of a batch are sets, each with its own beta: they share nothing but a step.

Axis letters: X layers, W label words.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import trees
from moe_jax.analysis.anchors import blocking, observed_model, prompts, saliency
from moe_jax.config import schema

Array = jax.Array
PAPER_RATE, REPOSITORY_RATE, EPOCHS = 0.01, 0.1, 10


class Fitted(NamedTuple):
  """What was learned."""

  beta: np.ndarray  # [B, X, N, W] float32
  losses: np.ndarray  # [epochs, B], means over an epoch


def factors(beta: Array, batch: prompts.Batch) -> Array:
  """beta [B, X, N, W] as factors on attention, [X, B, N, L, S]."""
  rows, length = batch.tokens.shape
  of_words = jnp.take_along_axis(
    jnp.exp(beta), batch.classes[:, None, None, :], axis=3
  )  # [B, X, N, demonstrations]
  out = jnp.ones((rows, *beta.shape[1:3], length, length), jnp.float32)
  row = jnp.arange(rows)[:, None]
  # Two index arrays apart from each other: their axes come first.
  out = out.at[row, :, :, batch.target[:, None], batch.places].set(jnp.moveaxis(of_words, 3, 1))
  return jnp.moveaxis(out, 1, 0)


def _logits(
  cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch, beta: Array
) -> Array:
  control = {'factors': factors(beta, batch)}
  return observed_model.apply(cfg, variables, batch.tokens, batch.mask, control).logits


@functools.partial(jax.jit, static_argnums=(0, 3))
def _fit(
  cfg: schema.ModelConfig, variables: trees.Variables, batches: prompts.Batch, rate: float, order
):
  """One step per entry of `order` [steps, B], the example of each set."""
  sets = batches.tokens.shape[1]
  adam = optax.adam(rate, b1=0.9, b2=0.999)
  beta = jnp.zeros((sets, cfg.num_layers, cfg.num_heads, batches.label_ids.shape[-1]), jnp.float32)

  def step(carry, which):
    beta, state = carry
    batch = prompts.Batch(*(a[which, jnp.arange(sets)] for a in batches))

    def loss(beta):
      losses = saliency.label_losses(_logits(cfg, variables, batch, beta), batch)
      return losses.sum(), losses

    (_, losses), grad = jax.value_and_grad(loss, has_aux=True)(beta)
    updates, state = adam.update(grad, state)
    return (optax.apply_updates(beta, updates), state), losses

  (beta, _), losses = jax.lax.scan(step, (beta, adam.init(beta)), order)
  return beta, losses


def fit(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  batches: prompts.Batch,
  *,
  rate: float = PAPER_RATE,
  epochs: int = EPOCHS,
  seed: int = 0,
) -> Fitted:
  """Learns beta of every set by Adam, one example at a time in an order of its own per epoch.

  Args:
    cfg: the model, which is frozen.
    variables: params and router_state.
    batches: leaves [examples, B, ...], the auxiliary examples of B sets.
    rate: Adam's; the paper says 0.01, its code 0.1.
    epochs: passes over the examples.
    seed: decides the order.
  """
  examples, sets = batches.tokens.shape[:2]
  rng = np.random.default_rng(seed)
  order = np.concatenate(
    [np.argsort(rng.random((examples, sets)), axis=0) for _ in range(epochs)]
  ).astype(np.int32)
  beta, losses = jax.device_get(_fit(cfg, variables, batches, rate, order))
  return Fitted(beta, losses.reshape(epochs, examples, sets).mean(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _predict(cfg, variables, batch, beta) -> blocking.Predictions:
  return blocking.predictions_of(_logits(cfg, variables, batch, beta), batch)


def predict(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  batch: prompts.Batch,
  beta: np.ndarray,
  *,
  size: int,
) -> blocking.Predictions:
  """Predictions with beta [B, X, N, W] of each prompt, `size` prompts at a time."""
  parts = []
  for begin in range(0, len(batch.tokens), size):
    rows = slice(begin, begin + size)
    parts.append(jax.device_get(_predict(cfg, variables, batch.take(rows), beta[rows])))
  return blocking.Predictions(*(np.concatenate(arrays) for arrays in zip(*parts)))
