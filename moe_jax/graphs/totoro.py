"""Totoro, how much other classes' influence meets a labelled node's, and ReNode's weights of it.

With P personalised PageRank, C_j the labelled nodes of class j and y_v the class of v (ReNode,
arXiv 2110.04099, equation 4):

  T_v = sum_x P[v, x] sum_{j != y_v} 1/|C_j| sum_{i in C_j} P[i, x]

Large near a border between classes. As P is symmetric, this is two products of P with one column
per class: `of_nodes` needs no matrix [nodes, nodes], where the authors' code inverts one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors
from moe_jax.graphs import pagerank


def class_means(labels: jax.Array, train: jax.Array, num_classes: int) -> jax.Array:
  """[nodes], [nodes] bool -> [nodes, classes]: 1/|C_j| at the labelled nodes of class j."""
  members = jax.nn.one_hot(labels, num_classes) * train[:, None]
  return members / jnp.maximum(members.sum(0), 1)


def of_nodes(
  spread: Callable[[jax.Array], jax.Array], labels: jax.Array, train: jax.Array, num_classes: int
) -> jax.Array:
  """Returns T [nodes] of the labelled nodes, 0 for the others.

  Args:
    spread: the product of P and a matrix [nodes, columns], exact or `pagerank.apply`.
    labels: [nodes] classes.
    train: [nodes] bool, the labelled nodes; only their labels are looked at.
    num_classes: number of classes.
  """
  influence = spread(class_means(labels, train, num_classes))
  met = spread(influence.sum(1, keepdims=True) - influence)
  own = jnp.take_along_axis(met, jnp.where(train, labels, 0)[:, None], axis=1)[:, 0]
  return jnp.where(train, own, 0)


def of_rows(rows: Any, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns T [labelled] from the labelled nodes' rows of P alone, as for PPRGo.

  Args:
    rows: [labelled, nodes], dense or sparse.
    labels: [labelled] classes.
    num_classes: number of classes.
  """
  members = np.eye(num_classes)[labels]
  influence = (rows.T @ (members / np.maximum(members.sum(0), 1))).T  # [classes, nodes]
  met = rows @ (influence.sum(0, keepdims=True) - influence).T
  return met[np.arange(len(labels)), labels]


def of_graph(totoro: jax.Array, train: jax.Array) -> jax.Array:
  """Returns the graph's topology imbalance, the sum of T over labelled nodes (ReNode, 3.2)."""
  return jnp.sum(totoro * train, -1)


def error_bound(restart: float, steps: int, class_sizes: np.ndarray) -> float:
  """Largest error of a T of `of_nodes` with `pagerank.apply` of so many steps.

  A column of `class_means` has length 1/sqrt(|C_j|) and is multiplied by P twice, whose largest
  eigenvalue is 1, each time with a relative error of `pagerank.error_bound`.
  """
  return 2 * pagerank.error_bound(restart, steps) * float(np.sum(1 / np.sqrt(class_sizes)))


def ranks(totoro: jax.Array, train: jax.Array) -> jax.Array:
  """Returns [nodes] ranks from 0 of labelled nodes, smallest T first; equal ones share a mean."""
  placed = jnp.where(train, totoro, jnp.inf)
  order = jnp.sort(placed)
  below = jnp.searchsorted(order, placed, side='left')
  through = jnp.searchsorted(order, placed, side='right')
  return (below + through - 1) / 2


def weights(
  totoro: jax.Array, train: jax.Array, w_min: float = 0.5, w_max: float = 1.5
) -> jax.Array:
  """Returns ReNode's weights [nodes]: w_max for the smallest T, w_min for the largest, by a cosine.

  Zero for nodes without a label (ReNode, equation 5, with the ranks 0 to |L| - 1 of the authors'
  code). The mean is (w_min + w_max) / 2 where all T differ; nodes of equal T share the mean of
  their ranks, which can move it, and a single labelled node has w_max.

  Args:
    totoro: [nodes] of `of_nodes`.
    train: [nodes] bool, the labelled nodes.
    w_min: smallest weight.
    w_max: largest weight.
  """
  place = ranks(totoro, train) / jnp.maximum(jnp.sum(train) - 1, 1)
  return jnp.where(train, w_min + 0.5 * (w_max - w_min) * (1 + jnp.cos(jnp.pi * place)), 0)


def weights_within_classes(
  totoro: jax.Array,
  labels: jax.Array,
  train: jax.Array,
  num_classes: int,
  w_min: float = 0.5,
  w_max: float = 1.5,
) -> jax.Array:
  """`weights` by ranks among the labelled nodes of a node's own class.

  Not in the paper: every class keeps a mean weight of about (w_min + w_max) / 2, where ranks among
  all nodes give less to a class that lies near others everywhere. What `weights` says of ties and
  of a single node holds class by class: one that is the only labelled node of its class has w_max.
  """
  members = (labels == jnp.arange(num_classes)[:, None]) & train
  found = jax.vmap(lambda chosen: weights(totoro, chosen, w_min, w_max))(members)
  return found.sum(0)


def check_weights(w_min: float, w_max: float):
  """Requires 0 <= w_min <= w_max."""
  errors.require(
    0 <= w_min <= w_max,
    f'w_min={w_min} must be from 0 to w_max={w_max}; ReNode has 0.5 and 1.5',
  )
