import types

import numpy as np
import pytest

from moe_jax.analysis import interventions
from moe_jax.analysis.probes import (
  ablation,
  probe_types,
)
from tests import tiny
from tests.analysis import subjects


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


def test_disable_top_probe_by_layer(subject):
  context = probe_types.Context(subject, 0)
  found = ablation.disable_top(context)
  assert found.arrays['disabled'].tolist() == [1, 2]  # of 8: 1/16 rounds to 0, 4/16 is 2
  for i in range(2):
    own = interventions.of_layer(subject.cfg.model, i, 1, 0)
    rise = subjects.bits(subject, disabled=own) - subjects.bits(subject)
    assert found.arrays['rise_of_layer'][i] == pytest.approx(rise, abs=1e-9)


def context_of(**overrides):
  cfg = tiny.make(**overrides)
  sample = types.SimpleNamespace(cfg=cfg)
  names = [f'layer {i + 1}' for i in range(cfg.model.num_moe_layers)]
  return types.SimpleNamespace(sample=sample, bits_per_byte=1.0, layer_names=lambda: names)


def figures(bits):
  return types.SimpleNamespace(bits_per_byte=bits)


def test_fewer_experts_by_hand(monkeypatch):
  bits = {1: 1.5, 2: 1.2, 3: 1.005}
  monkeypatch.setattr(interventions, 'with_fewer', lambda subject, k: figures(bits[k]))
  found = ablation.fewer_experts(context_of(model__moe__num_experts_per_tok=4))
  assert found.arrays['num_experts_per_tok'].tolist() == [1, 2, 3, 4]
  assert found.arrays['bits_per_byte'].tolist() == [1.5, 1.2, 1.005, 1.0]
  assert '2 of 4, held-out bits per byte are 1.200, with all 1.000, with one 1.500' in found.reading
  assert 'From 3 on' in found.reading


def test_enough_experts_are_so_with_every_larger_number(monkeypatch):
  """Two are within 0.01 by luck, three are not."""
  bits = {1: 1.5, 2: 1.005, 3: 1.02}
  monkeypatch.setattr(interventions, 'with_fewer', lambda subject, k: figures(bits[k]))
  found = ablation.fewer_experts(context_of(model__moe__num_experts_per_tok=4))
  assert 'From 4 on they are within 0.01 of all' in found.reading


def test_drop_shared_by_hand(monkeypatch):
  alone = {(0.0, 1.0): 1.25, (1.0, 0.0): 1.5}
  monkeypatch.setattr(
    interventions, 'without_shared', lambda subject, stand_in: figures(1.5 if stand_in else 2.0)
  )
  monkeypatch.setattr(
    interventions, 'measure', lambda subject, shared_scale: figures(alone[tuple(shared_scale)])
  )
  found = ablation.drop_shared(context_of())
  assert found.arrays['rise'] == 1.0 and found.arrays['rise_with_stand_in'] == 0.5
  assert found.arrays['rise_of_layer'].tolist() == [0.25, 0.5]
  assert 'with 1 more routed expert(s) per token in their place by 0.500' in found.reading
  assert 'Layer 2 alone loses most, +0.500' in found.reading
  # 2 + 7 of 8 experts: nobody is left to stand in.
  found = ablation.drop_shared(context_of(model__moe__num_shared_experts=7))
  assert np.isnan(found.arrays['rise_with_stand_in'])
  full = ablation.drop_shared(context_of(model__moe__num_shared_experts=6))
  assert full.arrays['rise_with_stand_in'] == 0.5  # 2 + 6 of 8 just fit
