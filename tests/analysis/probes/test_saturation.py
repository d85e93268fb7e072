import numpy as np
import pytest

from moe_jax.analysis.probes import (
  dependence,
  probe_types,
  report,
  saturation,
)
from tests.analysis import subjects


def test_kept_share_by_hand():
  before = np.array([[0, 1], [2, 3], [1, 4]])  # the last token has one choice only
  after = np.array([[1, 2], [2, 3], [0, 3]])
  assert saturation.kept_share(before, after, 4) == pytest.approx(3 / 5)
  assert saturation.kept_share(before, before, 4) == 1.0


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


def test_a_hash_router_reads_token_ids_only():
  hashed = subjects.subject_of(
    model__moe__router='hash', model__moe__balance__expert_level__weight=0.0
  )
  found = dependence.tokens_and_places(probe_types.Context(hashed, 0))
  np.testing.assert_allclose(found.arrays['token_id'], 1.0, atol=1e-6)
  assert np.all(found.arrays['place'] < 0.6)
  _, skipped = report.run(
    probe_types.Context(hashed, 0), ['confidence', 'disable_top', 'fewer_experts']
  )
  assert set(skipped) == {'confidence', 'disable_top', 'fewer_experts'}


def test_saturation_of_the_same_and_of_another_router(subject):
  other = subjects.with_weights(subject, lambda moe: moe | {'router': -moe['router']})
  steps = {10: subject.variables, 20: other.variables}
  found = saturation.saturation(probe_types.Context(subject, 0, steps, 30))
  np.testing.assert_array_equal(found.arrays['kept_share'][0], 1.0)
  assert found.arrays['kept_share'][1, 0] == 0.0  # the worst experts became the best
  assert 'by chance it would be 25 %' in found.reading
