import types

import numpy as np

from moe_jax.analysis.probes import (
  confidence,
)
from tests import tiny


def test_confidence_by_hand():
  found = confidence.measures(np.array([[1.0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2]]), 2)
  np.testing.assert_allclose(found['best'], [1, 0.25])
  np.testing.assert_allclose(found['chosen'], [1, 0.5])
  np.testing.assert_allclose(found['entropy'], [0, 1], atol=1e-12)


def test_the_probe_counts_the_chosen_k_and_averages_over_tokens():
  scores = np.array([[[0.5, 0.25, 0.25, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0, 0, 0]]])
  context = types.SimpleNamespace(
    subject=types.SimpleNamespace(cfg=tiny.make()),
    observations=types.SimpleNamespace(scores=scores, of_tokens=lambda a: a),
    layer_names=lambda: ['layer 1'],
  )
  found = confidence.confidence(context)
  assert found.arrays['mean_best'].tolist() == [0.75]
  assert found.arrays['mean_chosen'].tolist() == [0.875]  # K = 2
  np.testing.assert_allclose(found.arrays['mean_entropy'], 1.5 / 3 / 2)  # bits, of ln 8 = 3 bits
  assert 'the chosen 2 of 8 experts' in found.reading and 'would be 25 %' in found.reading
