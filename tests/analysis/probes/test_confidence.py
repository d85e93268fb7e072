import numpy as np

from moe_jax.analysis.probes import (
  confidence,
)


def test_confidence_by_hand():
  found = confidence.measures(np.array([[1.0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2]]), 2)
  np.testing.assert_allclose(found['best'], [1, 0.25])
  np.testing.assert_allclose(found['chosen'], [1, 0.5])
  np.testing.assert_allclose(found['entropy'], [0, 1], atol=1e-12)
