import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import block_model, dataset, pagerank, structs, totoro


def test_borders_are_where_they_were_planted():
  data = block_model.sample(600, 0)
  assert np.bincount(data.labels).tolist() == [120] * 5 and data.border.sum() == 5 * 36
  ends = data.labels[np.stack([data.graph.senders, data.graph.receivers])]
  crossing = ends[0] != ends[1]
  for end in (data.graph.senders, data.graph.receivers):
    assert data.border[end[crossing]].all(), 'an inner node has an edge to another class'
  assert set(((ends[0] - ends[1]) % 5)[crossing]) == {1, 4}, 'only neighbours of the ring meet'
  assert 0.1 < crossing.mean() < 0.4
  assert 5 < structs.degrees(data.graph).mean() < 6.5  # repeated edges count once
  assert structs.degrees(data.graph).max() > 20  # unequal degrees


def test_totoro_finds_the_planted_border():
  data = block_model.sample(600, 1)
  train = np.arange(600) % 3 == 0
  adjacency = structs.normalized(data.graph)
  found = np.asarray(
    totoro.of_nodes(lambda x: pagerank.apply(adjacency, x, steps=30), data.labels, train, 5)
  )
  at, inner = found[train & data.border], found[train & ~data.border]
  chance = (at[:, None] > inner).mean()  # that a border node has the larger one
  assert chance > 0.8


def test_a_graph_is_its_seeds():
  first, again, other = (block_model.sample(100, seed) for seed in (5, 5, 6))
  assert (first.features == again.features).all()
  assert first.graph.senders.tolist() == again.graph.senders.tolist()
  assert first.graph.senders.tolist() != other.graph.senders.tolist()


def test_features_tell_classes_by_their_signal():
  def spread(signal):
    data = block_model.sample(500, 0, signal=signal)
    means = np.stack([data.features[data.labels == c].mean(0) for c in range(5)])
    return np.linalg.norm(means, axis=1).mean()

  assert spread(0.0) < 0.2 and spread(3.0) == pytest.approx(3, abs=0.3)


def test_no_mixing_is_no_border():
  assert dataset.homophily(block_model.sample(200, 0, mixing=0.0)) == 1


def test_what_is_no_ring_is_refused():
  for change, words in (
    ({'num_classes': 2}, 'num_classes=2 must be at least 3'),
    ({'mixing': 1.5}, 'mixing=1.5 from 0 to 1'),
    ({'num_nodes': 20}, 'num_nodes=20 must be at least 10 per class'),
  ):
    with pytest.raises(errors.InputError, match=words):
      block_model.sample(**({'num_nodes': 100, 'seed': 0} | change))
