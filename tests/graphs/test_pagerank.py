import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import pagerank, structs
from tests.graphs import graph_cases

RESTART = 0.15


def reference(graph) -> np.ndarray:
  """P in float64, from the definition."""
  adjacency = np.zeros((graph.num_nodes, graph.num_nodes))
  adjacency[graph.receivers, graph.senders] = 1
  adjacency += np.eye(graph.num_nodes)
  root = np.sqrt(adjacency.sum(1))
  adjacency /= root[:, None] * root
  return RESTART * np.linalg.inv(np.eye(graph.num_nodes) - (1 - RESTART) * adjacency)


def test_exact_by_hand():
  # Two nodes, one edge: A' is 1/2 everywhere, a projection, so P = r I + (1 - r) A'.
  graph = structs.normalized(structs.undirected([(0, 1)], 2))
  want = 0.15 * np.eye(2) + 0.85 * 0.5
  np.testing.assert_allclose(pagerank.exact(graph, 0.15), want, rtol=1e-5)
  np.testing.assert_allclose(pagerank.exact(graph, 1.0), np.eye(2))


def test_exact_is_the_definition():
  graph = graph_cases.random_graph()
  found = pagerank.exact(structs.normalized(graph), RESTART)
  np.testing.assert_allclose(found, reference(graph), atol=1e-6)


@pytest.mark.parametrize('steps', [1, 4, 16])
def test_power_iteration_keeps_to_its_bound_and_needs_it(steps):
  graph = graph_cases.random_graph()
  x = np.random.default_rng(2).normal(size=(12, 5)).astype(np.float32)
  found = pagerank.apply(structs.normalized(graph), x, RESTART, steps)
  lengths = np.linalg.norm(x, axis=0)
  error = np.linalg.norm(np.asarray(found) - reference(graph) @ x, axis=0) / lengths
  bound = pagerank.error_bound(RESTART, steps)
  assert (error <= bound + 1e-6).all()
  assert error.max() > 1e-4 * bound, 'so loose a bound would hold of anything'


def test_steps_for_a_tolerance():
  steps = pagerank.steps_for(0.15, 1e-6)
  assert pagerank.error_bound(0.15, steps) <= 1e-6 < pagerank.error_bound(0.15, steps - 1)
  assert pagerank.steps_for(1, 1e-6) == 1


@pytest.mark.parametrize('epsilon', [1e-1, 1e-2, 1e-4])
def test_pushed_rows_keep_to_their_bound(epsilon):
  graph = graph_cases.random_graph()
  sources = np.array([3, 0, 11])  # 11 has no edge
  found = pagerank.push(graph, sources, RESTART, epsilon).toarray()
  degree = structs.degrees(graph) + 1
  missing = reference(graph)[sources] - found
  bound = epsilon * np.sqrt(degree[sources][:, None] * degree)
  assert (missing >= -1e-12).all() and (missing <= bound).all()
  if epsilon == 1e-1:
    assert missing.max() > 1e-3, 'nothing was left out'


def test_top_k_of_rows():
  rows = pagerank.sparse.csr_array(np.array([[0.0, 0.2, 0.5, 0.3], [0.7, 0, 0, 0]]))
  nodes, weights = pagerank.top_k(rows, 2)
  assert nodes.tolist() == [[2, 3], [0, 0]]
  np.testing.assert_allclose(weights, [[0.5, 0.3], [0.7, 0]])


def test_no_probability_is_refused():
  graph = structs.normalized(graph_cases.random_graph())
  for call in (
    lambda: pagerank.exact(graph, 0),
    lambda: pagerank.steps_for(1.5, 0.1),
    lambda: pagerank.push(graph_cases.random_graph(), np.array([0]), -1),
  ):
    with pytest.raises(errors.InputError, match='restart=.* must be above 0 and at most 1'):
      call()
  with pytest.raises(errors.InputError, match='epsilon=0 must be above 0'):
    pagerank.push(graph_cases.random_graph(), np.array([0]), 0.1, 0)
  with pytest.raises(errors.InputError, match='tolerance=2 must be between'):
    pagerank.steps_for(0.1, 2)


def test_columns_do_not_meet():
  graph = structs.normalized(graph_cases.random_graph())
  x = jnp.eye(12)[:, :2]
  both = pagerank.apply(graph, x, RESTART, 5)
  np.testing.assert_allclose(both[:, 1:], pagerank.apply(graph, x[:, 1:], RESTART, 5), atol=1e-7)
