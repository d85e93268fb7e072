"""Class weights of the ratio loss, which the server finds on samples of its own.

Wang et al., Addressing Class Imbalance in Federated Learning (arXiv 2008.06217): a weight of the
head belongs to the class whose samples move it most. How far a class moves its own weights, divided
by how far the others move them, sets its weight in the loss.
"""

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.federated import encoders, heads
from moe_jax.federated import settings as settings_lib

Array = jax.Array
NEXT_LARGEST = 0.8  # of the largest: a weight that another class moves so far belongs to none
LARGEST_RATIO = 5000.0
NO_RATIO = 10.0  # of a class whose weights the others do not move at all


def class_weights(
  settings: settings_lib.Settings, params: trees.Params, x: Array, y: Array
) -> Array:
  """1 + ratio_weight * ratio of each class, [classes].

  Args:
    settings: of the run.
    params: the model of which they are.
    x: the server's samples, [rows, height, width, channels], the same number of each class.
    y: their classes, [rows].
  """
  features = encoders.encode(settings, params['encoder'], x)
  means, _ = heads.class_means(y, jnp.ones_like(y, bool), settings.data.classes)
  moves = -heads.weighted_gradients(params['main'], features, y, means)['kernel']
  return 1 + settings.ratio_weight * ratios(moves)


def ratios(moves: Array) -> Array:
  """How far a class moves its own weights, by how far the others do, [classes].

  Args:
    moves: step of each weight by samples of each class, [classes, width, classes].
  """
  classes = len(moves)
  largest = moves.max(axis=0)
  near = (jnp.abs(moves) > NEXT_LARGEST * jnp.abs(largest)).sum(axis=0)
  owner = jnp.where((near < 2) & (largest > 0), moves.argmax(axis=0), classes)
  own = owner == jnp.arange(classes)[:, None, None]
  others = (moves.sum(axis=0) - moves) / (classes - 1)
  own_sum = jnp.abs((moves * own).sum(axis=(1, 2)))
  other_sum = jnp.abs((others * own).sum(axis=(1, 2)))
  found = own_sum / jnp.where(other_sum > 0, other_sum, 1)
  return jnp.where(other_sum > 0, jnp.minimum(found, LARGEST_RATIO), NO_RATIO)
