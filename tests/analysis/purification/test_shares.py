"""Mass by expert, and how few experts hold it."""

import math

import numpy as np

from moe_jax.analysis.purification import shares
from tests.analysis.purification import planted


def test_mass_is_of_the_experts_own_weights():
  tree = planted.numpy_params()
  for key in ('gate_up', 'down'):
    tree['moe_layers']['moe'][key] = np.zeros_like(tree['moe_layers']['moe'][key])
  tree['moe_layers']['moe']['gate_up'][1, 3, 0, 1, 2] = 5
  tree['moe_layers']['moe']['down'][1, 3, 0, 0] = 2
  expected = np.zeros((2, 8))
  expected[1, 3] = 7
  np.testing.assert_array_equal(shares.by_expert(tree), expected)


def test_fewest_experts_that_hold_a_share():
  mass = np.array([[6.0, 1.0], [2.0, 1.0]])
  assert shares.needed_for(mass, 0.5) == 0.25
  assert shares.needed_for(mass, 0.6) == 0.25
  assert shares.needed_for(mass, 0.61) == 0.5
  assert shares.needed_for(mass, 1.0) == 1.0
  assert shares.needed_for(np.ones((2, 5)), 0.5) == 0.5
  assert math.isnan(shares.needed_for(np.zeros((2, 2)), 0.5))


def test_highest():
  mass = np.array([[6.0, 1.0], [2.0, 1.0]])
  np.testing.assert_array_equal(shares.highest(mass, 0.5), [[True, False], [True, False]])
  assert shares.highest(mass, 0.01).sum() == 1
  assert not shares.highest(mass, 0).any() and shares.highest(mass, 1).all()
