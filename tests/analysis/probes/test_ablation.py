import pytest

from moe_jax.analysis import interventions
from moe_jax.analysis.probes import (
  ablation,
  probe_types,
)
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
