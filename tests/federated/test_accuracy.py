import numpy as np

from moe_jax.federated import accuracy


def test_groups_of_classes():
  right = np.array([[10, 8, 6, 4, 4, 4, 4, 2, 1, 0], [20] * 10])
  totals = np.array([10] * 8 + [20] * 2)
  found = accuracy.grouped(right, totals)
  # Accuracies of the first row: 1, .8, .6, .4 four times, .2, .05, 0.
  np.testing.assert_allclose(found['head'][0], 0.8)
  np.testing.assert_allclose(found['middle'][0], 0.4)
  np.testing.assert_allclose(found['tail'][0], 0.25 / 3)
  np.testing.assert_allclose(found['balanced'][0], (2.4 + 1.6 + 0.25) / 10)
  assert accuracy.members(100)['tail'] == slice(70, 100)
  assert accuracy.members(100)['head'] == slice(0, 30)
