import numpy as np
import pytest

from moe_jax.analysis import probes
from moe_jax.analysis.probes import (
  probe_types,
  report,
)
from tests.analysis import subjects


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


def test_every_probe_draws_and_reads(subject, tmp_path):
  context = probe_types.Context(subject, 0, {5: subject.variables}, 10)
  found, skipped = report.run(context, list(probes.PROBES))
  assert not skipped and set(found) == set(probes.PROBES)
  paths = report.draw(found, tmp_path)
  for name, one in found.items():
    assert paths[name].stat().st_size > 2000
    assert one.reading.endswith('.') and 'nan' not in one.reading, one.reading
    for value in one.arrays.values():
      assert isinstance(value, np.ndarray)
  layers = subject.cfg.model.num_moe_layers
  assert found['domains'].arrays['counts'].shape[:2] == (layers, 2)
  assert found['coactivation'].arrays['both'].shape == (layers, 8, 8)
