"""Losses of the clients, one figure per sample."""

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, labels: Array) -> Array:
  """-log softmax(logits)[label], [rows]."""
  chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def loss(kind: str, logits: Array, labels: Array, class_weights: Array, gamma: float) -> Array:
  """The loss of each sample, [rows].

  Args:
    kind: 'cross_entropy'; 'focal', (1 - p)^gamma times it (arXiv 1708.02002, equation 4); 'ratio',
      the weight of the sample's class times it (arXiv 2008.06217).
    logits: [rows, classes].
    labels: [rows].
    class_weights: [classes].
    gamma: of 'focal'.
  """
  found = cross_entropy(logits, labels)
  if kind == 'focal':
    return (1 - jnp.exp(-found)) ** gamma * found
  if kind == 'ratio':
    return class_weights[labels] * found
  if kind != 'cross_entropy':
    raise ValueError(f'kind={kind!r} must be cross_entropy, focal or ratio')
  return found
