import numpy as np
import pytest

from moe_jax.analysis.anchors import confusion, observed_model
from tests import tiny
from tests.analysis.anchors import batches


def test_distances_count_the_directions_of_the_queries():
  """Queries spread along the first axis with 3, along the second with 1, along the third not."""
  queries = np.array([[3, 1, 0], [-3, 1, 0], [3, -1, 0], [-3, -1, 0]], float) + [5, 5, 5]
  keys = np.array([[0, 0, 0], [1, 0, 9], [0, 1, 9.0]])
  got = confusion.distances(queries, keys)
  third = np.sqrt(3**2 + 1**2)
  want = np.array([[0, 3, 1], [3, 0, third], [1, third, 0]]) / third
  np.testing.assert_allclose(got, want, atol=1e-9)
  one = confusion.distances(queries, keys, directions=1)
  np.testing.assert_allclose(one, [[0, 1, 0], [1, 0, 1], [0, 1, 0]], atol=1e-9)


def test_measured_confusion():
  log_probs = np.log([[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
  own = confusion.pair_ratios(log_probs, np.array([0, 1, 2, 0]), 0, 1)
  np.testing.assert_allclose(np.exp(own.positive), [1.25, 0.5])
  np.testing.assert_allclose(np.exp(own.negative), [2 / 7])
  assert confusion.pair_auc([own]) == 1.0
  # Queries of another set count with them: one of class 1 whose 0.9 lies between 1.25 and 0.5.
  more = confusion.pair_ratios(np.log([[0.45, 0.5]]), np.array([1]), 0, 1)
  assert confusion.pair_auc([own, more]) == 3 / 4
  nothing = confusion.pair_ratios(log_probs, np.zeros(4, int), 0, 1)
  assert confusion.pair_auc([nothing]) is None
  assert confusion.pair_auc([nothing, own]) == 5.5 / 6  # one of six is 2 / 7 too


@pytest.mark.parametrize('layers, deep', [(48, 32), (6, 4), (1, 0)])
def test_the_layer(layers, deep):
  assert confusion.deep_layer(layers) == deep


def test_states_are_those_of_the_places():
  cfg, variables = batches.model()
  batch = batches.batch()
  batch.classes[1] = [1, 1, 0]  # the mean of two demonstrations; none of class 2
  got = confusion.states(cfg, variables, batch, 1, size=2)
  seen = tiny.jit(lambda: observed_model.apply(cfg, variables, batch.tokens, batch.mask))()
  queries, keys = (np.asarray(getattr(seen, name)[1]) for name in ('queries', 'keys'))
  for row in range(2):
    want = queries[row, batch.target[row]].ravel()
    np.testing.assert_allclose(got.queries[row], want, rtol=1e-4, atol=1e-6)
    repeated = np.repeat(keys[row, batch.places[row]], 2, axis=1)  # two query heads per key
    for label in range(3):
      own = repeated[batch.classes[row] == label].reshape(-1, 32)
      want = own.mean(axis=0) if len(own) else np.zeros(32)
      np.testing.assert_allclose(got.keys[row, label], want, rtol=1e-4, atol=1e-6)
