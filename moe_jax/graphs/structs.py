"""Sparse graphs as lists of weighted edges, and products with their adjacency matrices.

A product is a gather along the senders and a segment sum over the receivers, so its work and memory
grow with the edges. `propagate` takes a dense matrix in place of a graph too: its reference.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moe_jax import errors

Array = jax.Array | np.ndarray


@struct.dataclass
class Graph:
  """A matrix [nodes, nodes] whose entry (receiver, sender) is an edge's weight.

  Edges are in the order of their receivers, as segment sums are faster of sorted segments.
  """

  senders: Array  # [edges] int32
  receivers: Array  # [edges] int32, ascending
  weights: Array  # [edges] float32
  num_nodes: int = struct.field(pytree_node=False)

  @property
  def num_edges(self) -> int:
    """Directed edges: an undirected one counts twice."""
    return self.senders.shape[0]


Operator = Graph | Array  # what `propagate` multiplies by


def undirected(pairs: Any, num_nodes: int) -> Graph:
  """Returns the graph with both directions of every pair, each once, weight 1, without self-loops.

  Args:
    pairs: [pairs, 2] node numbers, in any order, repeated or not.
    num_nodes: of the graph; nodes without an edge are allowed.

  Raises:
    errors.InputError: a number is no node.
  """
  pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
  outside = pairs[(pairs < 0) | (pairs >= num_nodes)]
  errors.require(
    not outside.size,
    f'node {outside[0] if outside.size else 0} of an edge must be from 0 to {num_nodes - 1}; '
    'correct the edges or the number of nodes',
  )
  pairs = pairs[pairs[:, 0] != pairs[:, 1]]
  both = np.concatenate([pairs, pairs[:, ::-1]])
  receivers, senders = np.divmod(np.unique(both[:, 0] * num_nodes + both[:, 1]), num_nodes)
  return Graph(
    senders.astype(np.int32),
    receivers.astype(np.int32),
    np.ones(len(senders), np.float32),
    num_nodes,
  )


def degrees(graph: Graph) -> np.ndarray:
  """[nodes] float64: the sum of the weights of each node's edges."""
  return np.bincount(graph.receivers, np.asarray(graph.weights, np.float64), graph.num_nodes)


def with_self_loops(graph: Graph) -> Graph:
  """Returns A + I; the graph has none before."""
  nodes = np.arange(graph.num_nodes, dtype=np.int32)
  receivers = np.concatenate([graph.receivers, nodes])
  order = np.argsort(receivers, kind='stable')
  return Graph(
    np.concatenate([graph.senders, nodes])[order],
    receivers[order],
    np.concatenate([graph.weights, np.ones_like(nodes, np.float32)])[order],
    graph.num_nodes,
  )


def symmetric(graph: Graph) -> Graph:
  """Returns D^-1/2 A D^-1/2, with empty rows for nodes without an edge."""
  degree = degrees(graph)
  scale = 1 / np.sqrt(np.where(degree > 0, degree, 1))
  weights = graph.weights * scale[graph.senders] * scale[graph.receivers]
  return dataclasses.replace(graph, weights=weights.astype(np.float32))


def normalized(graph: Graph) -> Graph:
  """Returns A' = D^-1/2 (A + I) D^-1/2 of GCN (arXiv 1609.02907, 2) and ReNode's PageRank."""
  return symmetric(with_self_loops(graph))


def mean_of_neighbors(graph: Graph) -> Graph:
  """Returns D^-1 A: `propagate` takes the mean of a node's neighbours, 0 where there are none."""
  degree = degrees(graph)
  weights = graph.weights / np.where(degree > 0, degree, 1)[graph.receivers]
  return dataclasses.replace(graph, weights=weights.astype(np.float32))


def dense(graph: Graph) -> jax.Array:
  """Returns the matrix [nodes, nodes] of a graph."""
  empty = jnp.zeros((graph.num_nodes, graph.num_nodes), jnp.float32)
  return empty.at[graph.receivers, graph.senders].add(graph.weights)


def sum_at_receivers(graph: Graph, values: jax.Array) -> jax.Array:
  """[edges, ...] -> [nodes, ...], summed at the receivers."""
  return jax.ops.segment_sum(values, graph.receivers, graph.num_nodes, indices_are_sorted=True)


def propagate(operator: Operator, x: jax.Array) -> jax.Array:
  """Returns the product of a graph, or of a dense matrix, and x [nodes, columns]."""
  if not isinstance(operator, Graph):
    return jnp.asarray(operator) @ x
  weights = jnp.asarray(operator.weights)
  return sum_at_receivers(operator, weights[:, None] * jnp.asarray(x)[operator.senders])
