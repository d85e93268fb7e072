import numpy as np
import pytest

from moe_jax.graphs import metrics

#                     the last two are not chosen
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3])
SAID = np.array([0, 0, 1, 1, 2, 1, 0, 3])
CHOSEN = np.array([1, 1, 1, 1, 1, 1, 0, 0], bool)


def test_by_hand():
  # Class 0: 2 hits of 3 and 2 said, 4/5; 1: 1 hit of 2 and 3 said, 2/5; 2: none; 3: unseen.
  weighted, macro = metrics.f1(SAID, LABELS, CHOSEN, 4)
  assert float(weighted) == pytest.approx((3 * 0.8 + 2 * 0.4) / 6)
  assert float(macro) == pytest.approx((0.8 + 0.4) / 3)
  assert float(metrics.accuracy(SAID, LABELS, CHOSEN)) == pytest.approx(3 / 6)


def test_as_scikit_learn():
  sklearn = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  labels, said = rng.integers(0, 5, (2, 80))
  chosen = rng.random(80) < 0.5
  found = metrics.f1(said, labels, chosen, 5)
  for value, average in zip(found, ('weighted', 'macro')):
    want = sklearn.f1_score(labels[chosen], said[chosen], average=average)
    assert float(value) == pytest.approx(want, rel=1e-5)


def test_nothing_chosen_is_zero():
  nobody = np.zeros(8, bool)
  assert [float(value) for value in metrics.f1(SAID, LABELS, nobody, 4)] == [0, 0]
  assert float(metrics.accuracy(SAID, LABELS, nobody)) == 0
