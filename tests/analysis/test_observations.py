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
  raw = np.take_along_axis(seen.scores, seen.expert_idx, axis=-1)  # that the gates are made of
  gates, chosen = (a[:, seen.mask] for a in (seen.gates, raw))
  assert not subject.cfg.model.moe.norm_topk_prob
  np.testing.assert_allclose(gates, subject.cfg.model.moe.routed_scaling_factor * chosen, rtol=1e-6)
  part = observations.collect(subject, 16)
  assert len(part.tokens) == 1 < len(seen.tokens)
