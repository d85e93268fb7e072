"""The probes on models and routings whose right answer is known."""

import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis import information, interventions, observations, probes
from moe_jax.analysis.probes import (
  ablation,
  coactivation,
  confidence,
  dependence,
  probe_types,
  report,
  saturation,
  weights,
)
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.training import evaluate
from tests import tiny

NAMES = ['layer 1', 'layer 2']


# --- labels and experts ------------------------------------------------------


def choices_of(ids, num_experts, k, seed=0):
  """A fixed, random set of k experts per id."""
  rng = np.random.default_rng(seed)
  table = np.stack([rng.permutation(num_experts)[:k] for _ in range(int(ids.max()) + 1)])
  return table[ids]


@pytest.mark.parametrize('k', [1, 3])
def test_a_router_that_looks_at_the_label_only_is_decided_by_it(k):
  rng = np.random.default_rng(0)
  ids = rng.integers(40, size=6000)
  choices = choices_of(ids, 8, k)
  assert information.decided_share(choices, ids, 8) == pytest.approx(1.0, abs=1e-6)
  # Labels that have nothing to do with it, few and many per token.
  for num in (5, 2000):
    other = rng.integers(num, size=6000)
    assert abs(information.decided_share(choices, other, 8)) < 0.03


def test_half_of_the_tokens_decided():
  rng = np.random.default_rng(0)
  ids = rng.integers(8, size=20_000)
  choices = np.where(rng.random(20_000) < 0.5, ids, rng.integers(8, size=20_000))[:, None]
  # Half of the tokens follow the id: p = 1/2 + 1/16 on its own expert, 1/16 on each other one.
  p = np.array([0.5625] + 7 * [0.0625])
  want = 1 - (-(p * np.log(p)).sum()) / np.log(8)
  assert information.decided_share(choices, ids, 8) == pytest.approx(want, abs=0.01)


def test_all_experts_leave_nothing_to_decide():
  choices = np.tile(np.arange(4), (100, 1))
  assert np.isnan(information.decided_share(choices, np.arange(100) % 5, 4))


def test_words_of_an_expert():
  table = np.zeros((6, 2), int)
  table[0] = 50, 50
  table[3] = 40, 0  # only ever expert 0
  table[5] = 10, 90
  table[4] = 0, 3  # too rare for a list
  ids, lift = dependence.words_of(table)
  assert ids[0, :2].tolist() == [3, 0] and ids[0, 2] == -1  # 0 is above expert 0's mean share
  assert ids[1, :1].tolist() == [5] and 4 not in ids
  assert lift[0, 0] == pytest.approx(1 / (100 / 243))


# --- pairs, weights, confidence, saturation ----------------------------------


def test_pairs_by_hand():
  choices = np.array([[0, 1], [0, 1], [2, 3], [0, 4]])  # 4 = no expert
  both = coactivation.pairs(choices, 4)
  assert both.tolist() == [[3, 2, 0, 0], [2, 2, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
  lift = coactivation.lift(both, 4)
  assert lift[0, 1] == pytest.approx(2 / (3 * 2 / 4)) and lift[2, 3] == pytest.approx(4.0)
  assert lift[0, 2] == 0 and np.all(np.diagonal(lift) == 1)


def test_effective_rank_of_copies():
  assert weights.effective_rank(np.eye(4)) == pytest.approx(4)
  assert weights.effective_rank(np.ones((4, 4))) == pytest.approx(1)
  cosines = np.eye(4)
  cosines[0, 1] = cosines[1, 0] = 1.0  # singular values sqrt(2), 1, 1
  share = np.array([2**0.5, 1, 1]) / (2 + 2**0.5)
  want = np.exp(-(share * np.log(share)).sum())
  assert weights.effective_rank(cosines) == pytest.approx(want)


def test_confidence_by_hand():
  found = confidence.measures(np.array([[1.0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2]]), 2)
  np.testing.assert_allclose(found['best'], [1, 0.25])
  np.testing.assert_allclose(found['chosen'], [1, 0.5])
  np.testing.assert_allclose(found['entropy'], [0, 1], atol=1e-12)


def test_kept_share_by_hand():
  before = np.array([[0, 1], [2, 3], [1, 4]])  # the last token has one choice only
  after = np.array([[1, 2], [2, 3], [0, 3]])
  assert saturation.kept_share(before, after, 4) == pytest.approx(3 / 5)
  assert saturation.kept_share(before, before, 4) == 1.0


# --- a real model -------------------------------------------------------------


def split_of(rows, documents=6, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(6, 30, size=documents)
  tokens = rng.integers(rows, size=lengths.sum()).astype(np.uint16)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  domain = (np.arange(documents) % 2).astype(np.int32)
  return corpus_lib.TokenSplit(tokens, offsets, lengths.astype(np.int64), domain)


def subject_of(**overrides):
  cfg = tiny.make(**overrides)
  split = split_of(cfg.model.vocab_size)
  tokenizer = tokenizer_lib.byte_tokenizer('<b>', '<e>')
  corpus = corpus_lib.Corpus(tokenizer, (split,), (1.0,), split, ('even', 'odd'), '', ())
  variables = {'params': tiny.params(cfg.model), 'router_state': tiny.router_state(cfg.model)}
  return interventions.Subject(cfg, variables, corpus, tiny.mesh(1))


@pytest.fixture(scope='module')
def subject():
  return subject_of()


def with_weights(subject, change):
  """The model with other weights of its MoE layers."""
  params = jax.tree.map(np.asarray, subject.variables['params'])
  params['moe_layers']['moe'] = change(dict(params['moe_layers']['moe']))
  return subject._replace(variables={**subject.variables, 'params': params})


def bits(subject, **kwargs):
  return interventions.measure(subject, **kwargs).bits_per_byte


def test_without_an_intervention_nothing_changes(subject):
  plain = evaluate.evaluate(subject.cfg, subject.variables, subject.corpus, subject.mesh)
  assert bits(subject) == plain.bits_per_byte == bits(subject, disabled=[0, 0])


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
  assert bits(subject, disabled=[1, 0]) != bits(subject)


def test_a_shared_expert_that_does_nothing_is_not_missed(subject):
  def silence(moe):
    shared = dict(moe['shared'])
    shared['down'] = np.zeros_like(shared['down'])
    return moe | {'shared': shared}

  silent = with_weights(subject, silence)
  assert bits(silent, shared_scale=[0.0, 0.0]) == pytest.approx(bits(silent), rel=1e-6)
  assert abs(bits(subject, shared_scale=[0.0, 0.0]) - bits(subject)) > 1e-3
  # Dropping it where it does something is the same as silencing it.
  assert bits(subject, shared_scale=[0.0, 0.0]) == pytest.approx(bits(silent), rel=1e-6)


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
    interventions.measure(subject_of(**overrides), **kwargs)


def test_observations_are_the_models(subject):
  seen = observations.collect(subject, 0)
  assert seen.mask.sum() == subject.corpus.heldout.num_tokens
  top = np.argsort(-seen.scores, axis=-1, kind='stable')[..., : seen.expert_idx.shape[-1]]
  assert np.array_equal(np.sort(top[:, seen.mask]), np.sort(seen.expert_idx[:, seen.mask]))
  part = observations.collect(subject, 16)
  assert len(part.tokens) == 1 < len(seen.tokens)


def test_identical_experts_are_found(subject):
  def copy(moe):
    gate_up, down = moe['gate_up'].copy(), moe['down'].copy()
    gate_up[0, 5], down[0, 5] = gate_up[0, 2], down[0, 2]
    return moe | {'gate_up': gate_up, 'down': down}

  context = probe_types.Context(with_weights(subject, copy), 0)
  found = weights.expert_weights(context)
  assert found.arrays['cosines'][0, 2, 5] == pytest.approx(1.0, abs=1e-5)
  assert found.arrays['effective_rank'][0] < found.arrays['effective_rank'][1]
  assert 'most alike are 2 and 5 of layer 1, cosine 1.00' in found.reading


def test_a_hash_router_reads_token_ids_only():
  hashed = subject_of(model__moe__router='hash', model__moe__balance__expert_level__weight=0.0)
  found = dependence.tokens_and_places(probe_types.Context(hashed, 0))
  np.testing.assert_allclose(found.arrays['token_id'], 1.0, atol=1e-6)
  assert np.all(found.arrays['place'] < 0.6)
  _, skipped = report.run(
    probe_types.Context(hashed, 0), ['confidence', 'disable_top', 'fewer_experts']
  )
  assert set(skipped) == {'confidence', 'disable_top', 'fewer_experts'}


def test_saturation_of_the_same_and_of_another_router(subject):
  other = with_weights(subject, lambda moe: moe | {'router': -moe['router']})
  steps = {10: subject.variables, 20: other.variables}
  found = saturation.saturation(probe_types.Context(subject, 0, steps, 30))
  np.testing.assert_array_equal(found.arrays['kept_share'][0], 1.0)
  assert found.arrays['kept_share'][1, 0] == 0.0  # the worst experts became the best
  assert 'by chance it would be 25 %' in found.reading


def test_disable_top_probe_by_layer(subject):
  context = probe_types.Context(subject, 0)
  found = ablation.disable_top(context)
  assert found.arrays['disabled'].tolist() == [1, 2]  # of 8: 1/16 rounds to 0, 4/16 is 2
  for i in range(2):
    own = interventions.of_layer(subject.cfg.model, i, 1, 0)
    rise = bits(subject, disabled=own) - bits(subject)
    assert found.arrays['rise_of_layer'][i] == pytest.approx(rise, abs=1e-9)


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
