"""Accuracy and F1 of predicted classes among chosen nodes."""

import jax
import jax.numpy as jnp


def accuracy(predicted: jax.Array, labels: jax.Array, chosen: jax.Array) -> jax.Array:
  """Returns the share of chosen nodes [nodes] bool whose class is predicted."""
  return jnp.sum((predicted == labels) & chosen) / jnp.maximum(jnp.sum(chosen), 1)


def f1(
  predicted: jax.Array, labels: jax.Array, chosen: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
  """Returns (weighted, macro) F1 among chosen nodes.

  Weighted by how often a class is right; macro is the mean over classes that are right or predicted
  somewhere. A class that is never both has 0.
  """
  classes = jnp.arange(num_classes)
  said = (predicted[:, None] == classes) & chosen[:, None]
  true = (labels[:, None] == classes) & chosen[:, None]
  hits = jnp.sum(said & true, 0)
  sizes, total = jnp.sum(true, 0), jnp.sum(true, 0) + jnp.sum(said, 0)
  scores = 2 * hits / jnp.maximum(total, 1)
  weighted = jnp.sum(scores * sizes) / jnp.maximum(jnp.sum(sizes), 1)
  return weighted, jnp.sum(scores) / jnp.maximum(jnp.sum(total > 0), 1)
