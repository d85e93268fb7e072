import types

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


def test_the_probe_names_the_pair_of_highest_lift_that_is_no_chance():
  often, rare = [[0, 1]] * 20, [[2, 3]] * 19  # the rare pair has the higher lift
  choices = np.array([[*often, *rare, *[[0, 2]] * 30]])
  seen = types.SimpleNamespace(
    expert_idx=choices, num_experts=4, num_layers=1, of_tokens=lambda a: a
  )
  context = types.SimpleNamespace(observations=seen, layer_names=lambda: ['layer 1'])
  found = coactivation.coactivation(context)
  assert found.arrays['lift'][0, 0, 1] == pytest.approx(20 * 69 / (50 * 20))
  assert found.arrays['lift'][0, 2, 3] == pytest.approx(19 * 69 / (49 * 19))
  assert 'layer 1: experts 0 and 1, 1.4 times' in found.reading
