"""Linear heads, their gradients by class, and RedGrape's correction of the main head.

A head is a dict of `kernel` [width, classes] and `bias` [classes]; gradients by class have an axis
[classes] before these.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
Head = dict[str, Array]


def logits(head: Head, features: Array) -> Array:
  """[rows, width] -> [rows, classes]."""
  return features @ head['kernel'] + head['bias']


def weighted_gradients(head: Head, features: Array, labels: Array, weights: Array) -> Head:
  """Gradients of weighted sums of cross-entropies, in closed form: sum of w (softmax - e_c) h.

  Args:
    head: where they are taken.
    features: [rows, width].
    labels: [rows].
    weights: [groups, rows]; a sum per group.

  Returns:
    kernel [groups, width, classes] and bias [groups, classes].
  """
  error = jax.nn.softmax(logits(head, features)) - jax.nn.one_hot(labels, len(head['bias']))
  return {
    'kernel': jnp.einsum('gr,rw,rc->gwc', weights, features, error),
    'bias': weights @ error,
  }


def class_means(labels: Array, real: Array, classes: int) -> tuple[Array, Array]:
  """The weights of each class's mean, [classes, rows], and the samples of each class, [classes]."""
  member = ((labels == jnp.arange(classes)[:, None]) & real).astype(jnp.float32)
  counts = member.sum(axis=1)
  return member / jnp.maximum(counts, 1)[:, None], counts


def balanced_gradient(
  real: Head, in_real: Array, prototypes: Head, known: Array
) -> tuple[Head, Array]:
  """The gradient in which every class counts the same, as far as it is known (RedGrape).

  (|L| g_real + (classes - |L|) p) / classes, p being the mean prototype of the classes that are
  known and not in L; g_real alone if there is none, p alone if L is empty.

  Args:
    real: mean gradient over the client's own classes L; 0 if it has none.
    in_real: which classes these are, [classes].
    prototypes: gradients by class.
    known: which classes have a prototype, [classes].

  Returns:
    The gradient, and whether there is one at all.
  """
  missing = known & ~in_real
  weights = missing / jnp.maximum(missing.sum(), 1)
  share = in_real.mean()

  def mix(real: Array, prototypes: Array) -> Array:
    mean = jnp.tensordot(weights, prototypes, 1)
    return jnp.where(missing.any(), share * real + (1 - share) * mean, real)

  return jax.tree.map(mix, real, prototypes), missing.any() | in_real.any()


def corrected(head: Head, direction: Head, local: Head, scale: Array | float) -> Head:
  """The head after the correction, which has the norm `scale` * |local| in each tensor by itself.

  Outside of the optimizer: neither clipped nor part of the momentum (RedGrape, equation 13).

  Args:
    head: after the optimizer's step.
    direction: the balanced gradient.
    local: the batch's gradient before clipping.
    scale: learning rate times lambda.
  """

  def move(weights: Array, direction: Array, local: Array) -> Array:
    norm = jnp.linalg.norm(direction.ravel())
    factor = jnp.linalg.norm(local.ravel()) / jnp.where(norm > 0, norm, 1)
    return weights - scale * factor * direction

  return jax.tree.map(move, head, direction, local)
