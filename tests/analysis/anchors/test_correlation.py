import numpy as np
import pytest
from sklearn import metrics

from moe_jax.analysis.anchors import correlation, observed_model
from tests import tiny
from tests.analysis.anchors import batches


def test_auc_is_the_share_of_pairs():
  assert correlation.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4
  rng = np.random.default_rng(0)
  one, two = rng.normal(1, 1, size=30), rng.normal(size=20)
  want = metrics.roc_auc_score([1] * 30 + [0] * 20, [*one, *two])
  assert correlation.auc(one, two) == pytest.approx(want)


def test_one_against_one():
  rng = np.random.default_rng(1)
  labels = rng.integers(4, size=80)
  scores = rng.random((80, 4)) + np.eye(4)[labels] * 0.3
  scores /= scores.sum(axis=1, keepdims=True)
  want = metrics.roc_auc_score(labels, scores, multi_class='ovo')
  assert correlation.multiclass_auc(scores, labels) == pytest.approx(want)
  # A class that is never predicted is left out; of two the second decides.
  three = labels[labels != 2]
  kept = np.delete(scores[labels != 2], 2, axis=1)
  want = metrics.roc_auc_score(three, kept / kept.sum(axis=1, keepdims=True), multi_class='ovo')
  assert correlation.multiclass_auc(scores[labels != 2], three) == pytest.approx(want)
  two = np.isin(labels, [1, 3])
  share = scores[two][:, 3] / scores[two][:, [1, 3]].sum(axis=1)
  want = metrics.roc_auc_score(labels[two] == 3, share)
  assert correlation.multiclass_auc(scores[two], labels[two]) == pytest.approx(want)
  assert np.isnan(correlation.multiclass_auc(scores, np.zeros(80, int)))


def test_cumulative():
  got = correlation.cumulative(np.array([0.5, 0.6, 0.9]))
  np.testing.assert_allclose(got, [0.0, 0.2, 1.0], atol=1e-12)
  assert np.isnan(correlation.cumulative(np.array([0.5, 0.5]))).all()


def test_attention_of_a_class_is_summed_over_heads_and_demonstrations():
  cfg, variables = batches.model()
  batch = batches.batch()
  batch.classes[0] = [2, 0, 2]  # two demonstrations of one class, none of another
  got = correlation.scores(cfg, variables, batch, size=2)
  run = tiny.jit(lambda: observed_model.apply(cfg, variables, batch.tokens, batch.mask).probs)
  probs = np.asarray(run())
  for row in range(2):
    want = np.zeros((2, 3))
    for place, label in zip(batch.places[row], batch.classes[row]):
      want[:, label] += probs[:, row, :, batch.target[row], place].sum(axis=1)
    want /= want.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got[:, row], want, rtol=1e-4)
