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


def reading_of(choices):
  """What the probe finds in [layers, T, 2] of four experts."""
  seen = types.SimpleNamespace(
    expert_idx=np.array(choices), num_experts=4, num_layers=len(choices), of_tokens=lambda a: a
  )
  names = [f'layer {1 + i}' for i in range(len(choices))]
  context = types.SimpleNamespace(observations=seen, layer_names=lambda: names)
  return coactivation.coactivation(context)


def test_the_probe_names_the_pair_of_highest_lift_that_is_no_chance():
  often, rare = [[0, 1]] * 20, [[2, 3]] * 19  # the rare pair has the higher lift
  found = reading_of([[*often, *rare, *[[0, 2]] * 30]])
  assert found.arrays['lift'][0, 0, 1] == pytest.approx(20 * 69 / (50 * 20))
  assert found.arrays['lift'][0, 2, 3] == pytest.approx(19 * 69 / (49 * 19))
  assert 'layer 1: experts 0 and 1, 1.4 times' in found.reading
  assert 'Too few' not in found.reading


def test_too_few_tokens_name_no_pair():
  found = reading_of([[[0, 1]] * 19])
  assert found.reading.startswith('No two experts are chosen together by 20 tokens or more')
  # A layer that has a pair stands beside one that has none.
  pairs = [[2, 3]] * 10 + [[0, 1]] * 10
  found = reading_of([[[1, 2]] * 20, pairs])
  assert 'layer 1: experts 1 and 2, 1.0 times. Experts' in found.reading
  assert found.reading.endswith('Too few tokens to say so of layer 2.')
