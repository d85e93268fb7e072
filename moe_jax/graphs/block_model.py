"""Degree-corrected stochastic block graphs whose classes meet at borders that are known.

Classes stand in a ring. A share of each class's nodes are border nodes: an edge that begins at one
goes with probability `mixing` to a border node of one of the two neighbouring classes, else to any
node of its own class; edges of inner nodes stay in their class. Degrees follow random weights with
a Pareto tail (Karrer and Newman, arXiv 1008.3926). Features are a class's mean plus noise.
"""

import numpy as np

from moe_jax import errors
from moe_jax.graphs import dataset, structs


def sample(
  num_nodes: int,
  seed: int,
  num_classes: int = 5,
  degree: float = 6.0,
  border: float = 0.3,
  mixing: float = 0.7,
  num_features: int = 16,
  signal: float = 0.5,
  tail: float = 2.5,
) -> dataset.Dataset:
  """Returns a random graph, a pure function of the arguments.

  Args:
    num_nodes: nodes.
    seed: of everything random.
    num_classes: of equal size, but for what does not divide.
    degree: expected edges per node.
    border: share of border nodes.
    mixing: share of their edges that leave the class.
    num_features: features per node.
    signal: length of a class's mean, where a feature's noise has deviation 1.
    tail: exponent of the Pareto weights; smaller is more unequal.

  Raises:
    errors.InputError: fewer than three classes, or so few nodes that a class has no border.
  """
  errors.require(num_classes >= 3, f'num_classes={num_classes} must be at least 3, for a ring')
  errors.require(
    0 <= border < 1 and 0 <= mixing <= 1,
    f'border={border} must be at least 0 and below 1, mixing={mixing} from 0 to 1',
  )
  errors.require(
    num_nodes >= 10 * num_classes, f'num_nodes={num_nodes} must be at least 10 per class'
  )
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(num_nodes) % num_classes).astype(np.int32)
  at_border = np.zeros(num_nodes, bool)
  for c in range(num_classes):
    members = np.flatnonzero(labels == c)
    at_border[members[: round(border * len(members))]] = True
  weight = rng.pareto(tail, num_nodes) + 1
  senders = _draw(rng, weight, np.arange(num_nodes), round(num_nodes * degree / 2))
  leaves = at_border[senders] & (rng.random(len(senders)) < mixing)
  goal = (labels[senders] + leaves * rng.choice([-1, 1], len(senders))) % num_classes
  receivers = np.empty_like(senders)
  for c in range(num_classes):
    for leaving in (False, True):
      edges = np.flatnonzero((goal == c) & (leaves == leaving))
      nodes = np.flatnonzero((labels == c) & (at_border if leaving else True))
      receivers[edges] = _draw(rng, weight, nodes, len(edges))
  means = rng.normal(size=(num_classes, num_features))
  means *= signal / np.linalg.norm(means, axis=1, keepdims=True)
  features = means[labels] + rng.normal(size=(num_nodes, num_features)) / np.sqrt(num_features)
  return dataset.Dataset(
    f'sbm:{num_nodes}',
    structs.undirected(np.stack([senders, receivers], 1), num_nodes),
    features.astype(np.float32),
    labels,
    tuple(map(str, range(num_classes))),
    at_border,
  )


def _draw(
  rng: np.random.Generator, weight: np.ndarray, nodes: np.ndarray, count: int
) -> np.ndarray:
  """Draws `count` of `nodes`, each in proportion to its weight."""
  if not count:
    return np.zeros(0, nodes.dtype)
  total = np.cumsum(weight[nodes])
  return nodes[np.searchsorted(total, rng.random(count) * total[-1], side='right')]
