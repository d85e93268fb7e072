import numpy as np
import pytest

from moe_jax.analysis.probes import (
  probe_types,
  weights,
)
from tests.analysis import subjects


def test_effective_rank_of_copies():
  assert weights.effective_rank(np.eye(4)) == pytest.approx(4)
  assert weights.effective_rank(np.ones((4, 4))) == pytest.approx(1)
  cosines = np.eye(4)
  cosines[0, 1] = cosines[1, 0] = 1.0  # singular values sqrt(2), 1, 1
  share = np.array([2**0.5, 1, 1]) / (2 + 2**0.5)
  want = np.exp(-(share * np.log(share)).sum())
  assert weights.effective_rank(cosines) == pytest.approx(want)


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


def test_identical_experts_are_found(subject):
  def copy(moe):
    gate_up, down = moe['gate_up'].copy(), moe['down'].copy()
    gate_up[0, 5], down[0, 5] = gate_up[0, 2], down[0, 2]
    return moe | {'gate_up': gate_up, 'down': down}

  context = probe_types.Context(subjects.with_weights(subject, copy), 0)
  found = weights.expert_weights(context)
  assert found.arrays['cosines'][0, 2, 5] == pytest.approx(1.0, abs=1e-5)
  assert found.arrays['effective_rank'][0] < found.arrays['effective_rank'][1]
  assert 'most alike are 2 and 5 of layer 1, cosine 1.00' in found.reading


def test_one_expert_is_like_no_other():
  one = subjects.subject_of(model__moe__num_experts=1, model__moe__num_experts_per_tok=1)
  with pytest.raises(probe_types.NotApplicableError, match='no two to compare'):
    weights.expert_weights(probe_types.Context(one, 0))
