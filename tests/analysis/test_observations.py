import numpy as np
import pytest

from moe_jax.analysis import observations
from tests.analysis import subjects


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


def test_observations_are_the_models(subject):
  seen = observations.collect(subject, 0)
  assert seen.mask.sum() == subject.corpus.heldout.num_tokens
  top = np.argsort(-seen.scores, axis=-1, kind='stable')[..., : seen.expert_idx.shape[-1]]
  assert np.array_equal(np.sort(top[:, seen.mask]), np.sort(seen.expert_idx[:, seen.mask]))
  part = observations.collect(subject, 16)
  assert len(part.tokens) == 1 < len(seen.tokens)
