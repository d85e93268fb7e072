import numpy as np
import pytest

from moe_jax.analysis.probes import (
  coactivation,
)


def test_pairs_by_hand():
  choices = np.array([[0, 1], [0, 1], [2, 3], [0, 4]])  # 4 = no expert
  both = coactivation.pairs(choices, 4)
  assert both.tolist() == [[3, 2, 0, 0], [2, 2, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
  lift = coactivation.lift(both, 4)
  assert lift[0, 1] == pytest.approx(2 / (3 * 2 / 4)) and lift[2, 3] == pytest.approx(4.0)
  assert lift[0, 2] == 0 and np.all(np.diagonal(lift) == 1)
