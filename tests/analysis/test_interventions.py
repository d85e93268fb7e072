import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis import interventions, observations
from moe_jax.data import corpus as corpus_lib
from moe_jax.training import evaluate
from tests import tiny
from tests.analysis import subjects


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


def test_without_an_intervention_nothing_changes(subject):
  plain = evaluate.evaluate(subject.cfg, subject.variables, subject.corpus, subject.mesh)
  assert subjects.bits(subject) == plain.bits_per_byte == subjects.bits(subject, disabled=[0, 0])


def test_disabled_experts_are_the_best_of_each_token(subject):
  seen = observations.collect(subject, 0)
  best = seen.scores.argmax(axis=-1)
  found = interventions.measure(subject, disabled=[1, 0])
  loads = found.load
  # Layer 0: the ranks 2 and 3 of every token, and nobody's best; by hand from the scores.
  order = np.argsort(-seen.scores[0], axis=-1, kind='stable')
  want = np.bincount(order[seen.mask][:, 1:3].ravel(), minlength=seen.num_experts)
  assert loads[0].tolist() == want.tolist()
  assert best.shape == seen.expert_idx.shape[:-1]
  assert subjects.bits(subject, disabled=[1, 0]) != subjects.bits(subject)


def test_a_shared_expert_that_does_nothing_is_not_missed(subject):
  def silence(moe):
    shared = dict(moe['shared'])
    shared['down'] = np.zeros_like(shared['down'])
    return moe | {'shared': shared}

  silent = subjects.with_weights(subject, silence)
  assert subjects.bits(silent, shared_scale=[0.0, 0.0]) == pytest.approx(
    subjects.bits(silent), rel=1e-6
  )
  assert abs(subjects.bits(subject, shared_scale=[0.0, 0.0]) - subjects.bits(subject)) > 1e-3
  # Dropping it where it does something is the same as silencing it.
  assert subjects.bits(subject, shared_scale=[0.0, 0.0]) == pytest.approx(
    subjects.bits(silent), rel=1e-6
  )


def test_fewer_experts_is_the_override(subject):
  cfg = tiny.make(model__moe__num_experts_per_tok=1)
  want = evaluate.evaluate(cfg, subject.variables, subject.corpus, subject.mesh).bits_per_byte
  assert interventions.with_fewer(subject, 1).bits_per_byte == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
  'overrides, kwargs, message',
  [
    ({}, {'disabled': [7, 0]}, 'at most 6'),
    ({}, {'disabled': [1]}, 'each of the 2 MoE layers'),
    ({'model__moe__num_shared_experts': 0}, {'shared_scale': [0.0, 1.0]}, 'no shared expert'),
    ({'model__moe__router': 'expert_choice'}, {'disabled': [1, 1]}, 'does not rank'),
    ({'model__moe__num_experts': 0, 'model__moe__num_shared_experts': 0}, {}, 'dense model'),
  ],
)
def test_refusals(overrides, kwargs, message):
  with pytest.raises(errors.InputError, match=message):
    interventions.measure(subjects.subject_of(**overrides), **kwargs)


def test_sample_takes_the_beginnings_of_all_documents():
  tokens = np.arange(60).astype(np.uint16)
  offsets, num_bytes = np.array([0, 10, 40, 60]), np.array([20, 90, 20])
  split = corpus_lib.TokenSplit(tokens, offsets, num_bytes, np.array([0, 1, 2], np.int32))
  part = split.sample(30)  # 10 of each
  assert part.offsets.tolist() == [0, 10, 20, 30] and part.num_bytes == 20 + 30 + 10
  assert part.tokens[[0, 10, 20]].tolist() == [0, 10, 40]
  part = split.sample(44)  # the first whole, 17 of the two others
  assert part.offsets.tolist() == [0, 10, 27, 44] and part.doc_domain.tolist() == [0, 1, 2]
  assert split.sample(60) is split and split.sample(1).num_tokens == 3


def test_stand_ins_are_as_many_as_the_shared_experts(monkeypatch):
  asked = []
  monkeypatch.setattr(interventions, 'measure', lambda subject, **kwargs: asked.append(kwargs))
  cfg = tiny.make(model__moe__num_shared_experts=3)
  subject = interventions.Subject(cfg, {}, None, None)
  for stand_in, k in ((False, None), (True, 5)):
    interventions.without_shared(subject, stand_in=stand_in)
    assert asked.pop() == {'shared_scale': [0.0, 0.0], 'num_experts_per_tok': k}
  interventions.without_best(subject, 0.25)
  assert asked.pop() == {'disabled': [2, 2]}
