"""Dormant units: activity by hand, what is zeroed, experts without tokens."""

import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis.purification import pruning
from moe_jax.models import layers, transformer
from tests.analysis.purification import planted


def found():
  model = planted.model()
  return pruning.activity(model, planted.variables(model), planted.batch(), 3)


def test_activity_is_the_mean_over_tokens_that_chose_the_expert():
  model, batch = planted.model(), planted.batch()
  variables = planted.variables(model)
  active = found()
  assert {path: a.shape for path, a in active.items()} == {
    ('dense_layers', 'mlp'): (1, 24),
    ('moe_layers', 'moe'): (2, 8, 8),
    ('moe_layers', 'moe', 'shared'): (2, 8),
  }
  inputs = (batch[key] for key in ('tokens', 'positions', 'segment_ids'))
  _, sown = transformer.Transformer(model).apply(
    variables,
    *inputs,
    mutable=['intermediates'],
    capture_intermediates=lambda m, n: n == '__call__' and isinstance(m, layers.RMSNorm),
  )
  sown = sown['intermediates']['moe_layers']
  x = np.asarray(sown['ffn_norm']['__call__'][0])[1]  # [B, L, D] of the last layer
  chosen = np.asarray(sown['moe']['expert_idx'][0])[1]
  weights = np.asarray(variables['params']['moe_layers']['moe']['gate_up'])[1]
  for expert in range(8):
    rows = x[(chosen == expert).any(axis=-1) & (batch['segment_ids'] > 0)]
    gate, up = rows @ weights[expert, :, 0], rows @ weights[expert, :, 1]
    expected = np.abs(gate / (1 + np.exp(-gate)) * up).mean(axis=0)
    np.testing.assert_allclose(active['moe_layers', 'moe'][1, expert], expected, rtol=1e-4)


def test_the_least_active_share_of_a_layer_goes():
  params, active = planted.numpy_params(), found()
  left = pruning.pruned(params, active, 0.75)
  mlp, values = left['dense_layers']['mlp'], active['dense_layers', 'mlp'][0]
  zero = ~mlp['down'][0].any(axis=1)
  assert zero.sum() == 6 and values[zero].max() < values[~zero].min()
  np.testing.assert_array_equal(zero, ~mlp['gate_up'][0].any(axis=(0, 1)))
  experts = left['moe_layers']['moe']['down']
  np.testing.assert_array_equal((~experts.any(axis=-1)).sum(axis=(1, 2)), [16, 16])
  np.testing.assert_array_equal(left['embedding'], params['embedding'])


def test_all_stay_at_one():
  params = planted.numpy_params()
  left = pruning.pruned(params, found(), 1.0)
  assert all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(params)))


def test_experts_without_tokens_stay():
  params, active = planted.numpy_params(), found()
  active['moe_layers', 'moe'][0, 2] = np.nan
  left = pruning.pruned(params, active, 0.0)['moe_layers']['moe']['down']
  assert left[0, 2].all() and not left[0, 3].any()


def test_a_share_outside():
  with pytest.raises(errors.InputError, match='--reserve=2'):
    pruning.pruned(planted.numpy_params(), found(), 2.0)
