import numpy as np
import pytest

from moe_jax.graphs import dataset, structs


def test_homophily_by_hand():
  # Edges 0-1 and 2-3 within, 1-2 between; 3-4 does not count, as 4's class is unknown.
  graph = structs.undirected([(0, 1), (1, 2), (2, 3), (3, 4)], 5)
  labels = np.array([0, 0, 1, 1, -1])
  data = dataset.Dataset('x', graph, np.zeros((5, 1)), labels, ('a', 'b'))
  assert data.num_classes == 2 and dataset.homophily(data) == pytest.approx(2 / 3)


def test_unit_rows():
  found = dataset.unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)
