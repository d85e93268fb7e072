import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import dataset, nearest_neighbors


def test_neighbours_on_a_line():
  # 0 and 1 are each other's nearest, 3's nearest is 1, 7's is 3.
  found = nearest_neighbors.graph(np.array([[0.0], [1.0], [3.0], [7.0]]), 1)
  edges = set(zip(found.senders.tolist(), found.receivers.tolist()))
  assert edges == {(0, 1), (1, 0), (2, 1), (1, 2), (3, 2), (2, 3)}


def test_blocks_do_not_show(monkeypatch):
  features = np.random.default_rng(0).normal(size=(50, 4))
  whole = nearest_neighbors.graph(features, 3)
  monkeypatch.setattr(nearest_neighbors, '_BLOCK', 7)
  parts = nearest_neighbors.graph(features, 3)
  assert (whole.senders == parts.senders).all() and (whole.receivers == parts.receivers).all()
  squares = ((features[:, None] - features) ** 2).sum(-1)
  nearest = np.argsort(squares + np.diag([np.inf] * 50), axis=1)[:, :3]
  pairs = {frozenset((i, int(j))) for i in range(50) for j in nearest[i]}
  assert {
    frozenset(pair) for pair in zip(whole.senders.tolist(), whole.receivers.tolist())
  } == pairs


def test_digits_of_a_kind_are_near():
  pytest.importorskip('sklearn')
  data = nearest_neighbors.digits()
  assert data.features.shape == (1797, 64) and data.num_classes == 10
  assert 0.9 < dataset.homophily(data) < 1


def test_more_neighbours_than_samples_are_refused():
  with pytest.raises(errors.InputError, match='k=3 must be from 1 to 2'):
    nearest_neighbors.graph(np.zeros((3, 1)), 3)
