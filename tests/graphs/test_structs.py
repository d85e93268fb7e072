import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import structs
from tests.graphs import graph_cases


def test_a_graph_by_hand():
  graph = structs.undirected([(2, 0), (0, 1), (1, 0), (1, 1)], 4)
  assert graph.num_edges == 4 and graph.num_nodes == 4
  assert graph.receivers.tolist() == [0, 0, 1, 2] and graph.senders.tolist() == [1, 2, 0, 0]
  assert structs.degrees(graph).tolist() == [2, 1, 1, 0]
  # A + I has degrees 3, 2, 2, 1.
  found = np.asarray(structs.dense(structs.normalized(graph)))
  six = 1 / np.sqrt(6)
  want = [[1 / 3, six, six, 0], [six, 0.5, 0, 0], [six, 0, 0.5, 0], [0, 0, 0, 1]]
  np.testing.assert_allclose(found, want, rtol=1e-6)
  means = np.asarray(structs.dense(structs.mean_of_neighbors(graph)))
  np.testing.assert_allclose(means, [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0] * 4])


def test_products_of_edges_and_of_the_dense_matrix_agree():
  # Weights that differ by direction, so that senders and receivers cannot be exchanged.
  graph = graph_cases.random_graph()
  rng = np.random.default_rng(1)
  graph = graph.replace(weights=rng.normal(size=graph.num_edges).astype(np.float32))
  x = rng.normal(size=(12, 3)).astype(np.float32)
  matrix = np.zeros((12, 12))
  for sender, receiver, weight in zip(graph.senders, graph.receivers, graph.weights):
    matrix[receiver, sender] += weight
  for operator in (graph, structs.dense(graph)):
    np.testing.assert_allclose(structs.propagate(operator, x), matrix @ x, atol=1e-5)


def test_an_edge_to_no_node_is_refused():
  with pytest.raises(errors.InputError, match='node 3 of an edge must be from 0 to 2'):
    structs.undirected([(0, 3)], 3)
