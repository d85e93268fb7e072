"""Graphs that the tests of this room share."""

import numpy as np

from moe_jax.graphs import structs


def two_clusters() -> tuple[structs.Graph, np.ndarray]:
  """Two cliques of five, 0-4 and 5-9, joined by the edge 4-5; and their classes."""
  pairs = [(i, j) for side in (0, 5) for i in range(side, side + 5) for j in range(side, i)]
  return structs.undirected([*pairs, (4, 5)], 10), np.repeat([0, 1], 5).astype(np.int32)


def random_graph(nodes: int = 12, edges: int = 20, seed: int = 0) -> structs.Graph:
  """A graph whose last node has no edge."""
  rng = np.random.default_rng(seed)
  return structs.undirected(rng.integers(0, nodes - 1, (edges, 2)), nodes)
