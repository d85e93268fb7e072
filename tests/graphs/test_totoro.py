import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import pagerank, structs, totoro
from tests.graphs import graph_cases

RESTART = 0.15


def by_definition(p, labels, train, num_classes) -> np.ndarray:
  """Equation 4, sum by sum."""
  found = np.zeros(len(labels))
  for v in np.flatnonzero(train):
    for x in range(len(labels)):
      for j in range(num_classes):
        members = [i for i in np.flatnonzero(train) if labels[i] == j]
        if j != labels[v] and members:
          found[v] += p[v, x] * np.mean([p[i, x] for i in members])
  return found


def case():
  """A random graph of three classes, of which the third is larger; -1 where unknown."""
  graph = graph_cases.random_graph(seed=3)
  labels = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, -1, -1, 2])
  train = np.array([1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1], bool)
  return graph, labels, train, np.asarray(pagerank.exact(structs.normalized(graph), RESTART))


def test_totoro_is_its_definition():
  _, labels, train, p = case()
  want = by_definition(p, labels, train, 3)
  found = totoro.of_nodes(lambda x: p @ x, labels, train, 3)
  np.testing.assert_allclose(found, want, rtol=1e-5)
  assert (want[train] > 0).sum() == 7, 'all but node 11, which has no edge'
  assert float(totoro.of_graph(found, train)) == pytest.approx(want.sum(), rel=1e-5)
  np.testing.assert_allclose(totoro.of_rows(p[train], labels[train], 3), want[train], rtol=1e-5)


@pytest.mark.parametrize('steps', [2, 10])
def test_power_iteration_keeps_to_totoros_bound(steps):
  graph, labels, train, p = case()
  spread = functools.partial(
    pagerank.apply, structs.normalized(graph), restart=RESTART, steps=steps
  )
  found = totoro.of_nodes(spread, labels, train, 3)
  error = np.abs(np.asarray(found) - by_definition(p, labels, train, 3)).max()
  assert 1e-6 < error <= totoro.error_bound(RESTART, steps, np.array([2, 2, 4]))


def test_the_border_has_the_larger_totoro_and_the_smaller_weight():
  graph, labels = graph_cases.two_clusters()
  train = np.isin(np.arange(10), [0, 4, 5, 9])  # 4 and 5 are joined
  p = pagerank.exact(structs.normalized(graph), RESTART)
  found = np.asarray(totoro.of_nodes(lambda x: p @ x, labels, train, 2))
  assert found[4] > 1.4 * found[0]
  np.testing.assert_allclose(found[[0, 4]], found[[9, 5]], rtol=1e-5)  # the classes are symmetric
  weights = np.asarray(totoro.weights(found, train))
  assert weights[0] > 1 > weights[4] and not weights[[1, 2, 3, 6, 7, 8]].any()


def test_weights_by_hand():
  #                              rank 1   2        0    3
  conflict = jnp.array([9.0, 0.2, 0.5, 0, 0.1, 0.7])
  train = jnp.array([0, 1, 1, 0, 1, 1], bool)
  assert totoro.ranks(conflict, train)[jnp.array([1, 2, 4, 5])].tolist() == [1, 2, 0, 3]
  found = totoro.weights(conflict, train, 0.25, 1.75)
  # 0.25 + 0.75 (1 + cos(pi rank / 3)): cosines 1, 1/2, -1/2, -1
  np.testing.assert_allclose(found, [0, 1.375, 0.625, 0, 1.75, 0.25], atol=1e-6)
  assert float(found.sum() / 4) == pytest.approx((0.25 + 1.75) / 2)


def test_equal_totoros_have_equal_weights():
  train = jnp.array([1, 1, 1, 0], bool)
  found = totoro.weights(jnp.array([0.3, 0.3, 0.3, 0.1]), train)
  np.testing.assert_allclose(found, [1, 1, 1, 0], atol=1e-6)
  assert totoro.ranks(jnp.array([0.3, 0.1, 0.3, 0.0]), train)[:3].tolist() == [1.5, 0, 1.5]
  assert float(totoro.weights(jnp.ones(2), jnp.array([True, False]))[0]) == 1.5  # nobody to compare


def test_weights_within_classes_by_hand():
  conflict = jnp.array([0.1, 0.2, 0.8, 0.9, 0.7, 0.0])
  labels, train = jnp.array([0, 0, 1, 1, 1, 0]), jnp.array([1, 1, 1, 1, 1, 0], bool)
  found = totoro.weights_within_classes(conflict, labels, train, 2)
  np.testing.assert_allclose(found, [1.5, 0.5, 1, 0.5, 1.5, 0], atol=1e-6)


def test_permuted_nodes_have_permuted_totoros():
  graph, labels, train, p = case()
  order = np.random.default_rng(4).permutation(12)
  plain = totoro.of_nodes(lambda x: p @ x, labels, train, 3)
  shuffled = p[np.ix_(order, order)]
  moved = totoro.of_nodes(lambda x: shuffled @ x, labels[order], train[order], 3)
  np.testing.assert_allclose(moved, np.asarray(plain)[order], rtol=1e-4)


def test_many_splits_by_vmap():
  _, labels, train, p = case()
  splits = np.stack([train, train & (np.arange(12) != 11)])

  def one(chosen):
    return totoro.of_nodes(lambda x: p @ x, labels, chosen, 3)

  for found, chosen in zip(jax.vmap(one)(splits), splits):
    np.testing.assert_allclose(found, by_definition(p, labels, chosen, 3), rtol=1e-4)


def test_weights_that_are_none_are_refused():
  totoro.check_weights(0.5, 0.5)
  for bad in ((-0.1, 1), (1.5, 0.5)):
    with pytest.raises(errors.InputError, match='w_min=.* must be from 0 to w_max='):
      totoro.check_weights(*bad)
