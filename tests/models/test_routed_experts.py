"""Which dispatch serves a call; values and gradients stand in tests of dispatch and exchange."""

import pytest

from moe_jax.devices import partitioning
from moe_jax.models import routed_experts
from tests import tiny

BOUNDED = dict(model__moe__capacity__policy='position', model__moe__capacity__factor=1.0)


@pytest.mark.parametrize(
  'overrides, train, choices, want',
  [
    ({}, True, 1, 'dropless'),
    ({}, False, 17, 'dropless'),
    ({}, False, 16, 'gather'),  # 2 choices for each of the 8 experts
    ({'model__moe__dispatch': 'dense'}, False, 1, 'dense'),
    ({'model__moe__dispatch': 'capacity', **BOUNDED}, True, 17, 'capacity'),
    # Nothing is dropped at evaluation, so that no buffer of a fixed size would do.
    ({'model__moe__dispatch': 'capacity', **BOUNDED}, False, 17, 'dropless'),
  ],
)
def test_dispatch_name(overrides, train, choices, want):
  cfg = tiny.make(**overrides).model.moe
  assert routed_experts.dispatch_name(cfg, train, choices) == want


def test_few_choices_are_no_case_of_their_own_where_experts_are_split():
  cfg = tiny.make().model.moe
  with partitioning.activate(tiny.mesh(expert=2)):
    assert routed_experts.dispatch_name(cfg, False, 16) == 'dropless'
