import types

import numpy as np

from moe_jax.analysis.probes import (
  confidence,
)
from tests import tiny


def test_confidence_by_hand():
  scores = np.array([[1.0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2]])
  found = confidence.measures(scores, np.array([[0, 1], [3, 0]]))
  np.testing.assert_allclose(found['best'], [1, 0.25])
  np.testing.assert_allclose(found['chosen'], [1, 0.5])
  np.testing.assert_allclose(found['entropy'], [0, 1], atol=1e-12)


def test_the_chosen_need_not_have_the_highest_scores():
  # A bias chose the experts of 0.3 and 0.1; a choice that is not used (4 = none) has no score.
  scores = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
  found = confidence.measures(scores, np.array([[1, 3], [2, 4]]))
  np.testing.assert_allclose(found['chosen'], [0.4, 0.2])
  np.testing.assert_allclose(found['best'], [0.4, 0.4])


def test_the_probe_counts_the_chosen_k_and_averages_over_tokens():
  scores = np.array([[[0.5, 0.25, 0.25, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0, 0, 0]]])
  chosen = np.array([[[0, 2], [0, 5]]])
  context = types.SimpleNamespace(
    subject=types.SimpleNamespace(cfg=tiny.make()),
    observations=types.SimpleNamespace(scores=scores, expert_idx=chosen, of_tokens=lambda a: a),
    layer_names=lambda: ['layer 1'],
  )
  found = confidence.confidence(context)
  assert found.arrays['mean_best'].tolist() == [0.75]
  assert found.arrays['mean_chosen'].tolist() == [0.875]  # K = 2
  np.testing.assert_allclose(found.arrays['mean_entropy'], 1.5 / 3 / 2)  # bits, of ln 8 = 3 bits
  assert 'the chosen 2 of 8 experts' in found.reading and 'would be 25 %' in found.reading
