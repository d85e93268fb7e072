import types

import numpy as np
import pytest
from matplotlib import figure

from moe_jax.analysis.probes import probe_types, traffic
from tests import tiny


def context_of(**overrides):
  """Two layers, one row of 4 real tokens, 4 experts of which each token takes two."""
  sizes = {
    'model__moe__num_experts': 4,
    'model__num_layers': 3,
    'model__moe__num_shared_experts': 0,
  }
  cfg = tiny.make(**(sizes | overrides))
  apart = [[0, 2], [1, 3], [0, 3], [1, 2]]  # devices 0 and 1 each
  side = [[0, 1], [0, 1], [0, 1], [2, 3]]  # one device each, three on device 0
  seen = types.SimpleNamespace(
    expert_idx=np.array([apart, side], np.int32)[:, None], mask=np.ones((1, 4), bool)
  )
  names = ['layer 1', 'layer 2']
  return types.SimpleNamespace(
    subject=types.SimpleNamespace(cfg=cfg),
    observations=seen,
    layer_names=lambda: names,
    first_layer=1,
  )


def test_two_devices_by_hand():
  found = traffic.traffic(context_of(model__moe__num_virtual_devices=2))
  assert isinstance(found, probe_types.Finding)
  assert found.arrays['devices_per_token'].tolist() == [2.0, 1.0]
  # 8 choices, 4 a device: layer 1 has 4 and 4, layer 2 has 6 and 2.
  np.testing.assert_allclose(found.arrays['straggler_factor'], [1.0, 1.5])
  assert found.arrays['tokens_sent'].shape == (2, 2, 2)
  assert found.arrays['tokens_sent'].sum(axis=(1, 2)).tolist() == [8, 4]
  assert found.reading.startswith('On 2 devices') and 'layer 2: 1.50' in found.reading
  fig = figure.Figure()
  found.draw(fig)
  assert [one.get_title() for one in fig.axes[:2]] == [
    'tokens sent, all layers',
    'load of the busiest device / mean',
  ]


@pytest.mark.parametrize('experts, devices', [(4, 4), (16, 8)])
def test_without_virtual_devices_it_looks_at_eight_or_one_per_expert(experts, devices):
  context = context_of(model__moe__num_virtual_devices=1, model__moe__num_experts=experts)
  found = traffic.traffic(context)
  assert found.arrays['tokens_sent'].shape == (2, devices, devices)
