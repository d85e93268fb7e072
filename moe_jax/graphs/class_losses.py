"""Losses per labelled node against unequal class sizes, as ReNode's authors combine them.

With n_c labelled nodes of class c (the whole loss is sum_v w_v loss_v / number of labelled nodes):

  cross_entropy   -log p_y
  re_weight       (mean of n) / n_y times cross entropy
  focal           (mean of n) / n_y times sum_c (1 - q_c)^gamma BCE_c over sigmoids, q_c the
                  probability of the right side (arXiv 1708.02002, gamma 2)
  class_balanced  class weight (1 - beta) / (1 - beta^n_y), which average to 1 over classes, times
                  the mean over classes of BCE of softmax probabilities (arXiv 1901.05555,
                  beta 0.9999)
"""

import jax
import jax.numpy as jnp
import optax

GAMMA, BETA = 2.0, 0.9999
LOSSES = ('cross_entropy', 're_weight', 'focal', 'class_balanced')


def class_weights(kind: str, sizes: jax.Array) -> jax.Array:
  """[classes] labelled nodes of each class -> [classes] weights of its losses."""
  sizes = jnp.maximum(sizes, 1).astype(jnp.float32)
  if kind in ('re_weight', 'focal'):
    return sizes.mean() / sizes
  if kind == 'class_balanced':
    # 1 - beta^n loses its digits for small n in float32.
    weights = (1 - BETA) / -jnp.expm1(sizes * jnp.log1p(BETA - 1))
    return weights / weights.mean()
  return jnp.ones_like(sizes)


def per_node(kind: str, logits: jax.Array, labels: jax.Array, sizes: jax.Array) -> jax.Array:
  """Returns the losses [nodes] of one of `LOSSES`.

  Args:
    kind: of `LOSSES`.
    logits: [nodes, classes].
    labels: [nodes] classes.
    sizes: [classes] labelled nodes.
  """
  weight = class_weights(kind, sizes)[labels]
  if kind in ('cross_entropy', 're_weight'):
    return weight * optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  right = jax.nn.one_hot(labels, logits.shape[-1])
  if kind == 'focal':
    signed = jnp.where(right == 1, logits, -logits)
    losses = jnp.exp(GAMMA * jax.nn.log_sigmoid(-signed)) * -jax.nn.log_sigmoid(signed)
    return weight * losses.sum(-1)
  log_p = jax.nn.log_softmax(logits)
  # log(1 - p), finite where p rounds to 1
  log_rest = jnp.log1p(-jnp.minimum(jnp.exp(log_p), 1 - 1e-6))
  return weight * -jnp.where(right == 1, log_p, log_rest).mean(-1)
