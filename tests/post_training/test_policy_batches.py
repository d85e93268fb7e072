"""Answers become rows: what stands where, and what counts."""

import dataclasses

import numpy as np
import pytest

from moe_jax.post_training import policy_batches, rollouts
from moe_jax.rewards import reward
from moe_jax.training import policy_loss
from tests import tiny
from tests.training.test_policy_loss import RUN


def make(**changes):
  return tiny.make(**(RUN | {'train__batch_size': 2} | changes))


def answer(prompt, tokens, *, question=0, ended=True, seed=0):
  rng, n = np.random.default_rng(seed), len(prompt) + len(tokens) - 1
  scores = rng.normal(size=(3, len(tokens))).astype(np.float32)
  experts = rng.integers(8, size=(2, n, 2)).astype(np.int32)
  return rollouts.Answer(question, prompt, tokens, ended, *scores, experts)


def worth(value, kind='', steps=None):
  return reward.Reward(value, {}, kind or ('right' if value else 'wrong'), steps)


ANSWERS = [answer([1, 2], [5, 6, 3]), answer([1, 2], [7, 3], seed=1)]
JUDGED = [
  policy_batches.Judged(ANSWERS[0], worth(1.0), np.array([0.5, 0.5, 0.5])),
  policy_batches.Judged(ANSWERS[1], worth(0.0), np.array([-1.0, -2.0])),
]


def test_a_row_holds_both_answers_with_targets_where_they_were_written():
  batch, where = policy_batches.rows(make(), JUDGED, 2)
  assert where == [(0, 0), (0, 4)]
  assert batch['tokens'].shape == (2, 16)  # a whole batch of rows, one of them empty
  np.testing.assert_array_equal(batch['tokens'][0, :8], [1, 2, 5, 6, 1, 2, 7, 0])
  np.testing.assert_array_equal(batch['targets'][0, :8], [-1, 5, 6, 3, -1, 7, 3, -1])
  np.testing.assert_array_equal(batch['segment_ids'][0, :8], [1, 1, 1, 1, 2, 2, 2, 0])
  np.testing.assert_array_equal(batch['positions'][0, :8], [0, 1, 2, 3, 0, 1, 2, 0])
  np.testing.assert_allclose(batch[policy_loss.ADVANTAGES][0, :8], [0, 0.5, 0.5, 0.5, 0, -1, -2, 0])
  np.testing.assert_allclose(
    batch[policy_loss.WEIGHTS][0, :8], [0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 4, 1 / 4, 0]
  )
  np.testing.assert_array_equal(
    batch[policy_loss.EXPERTS][0, 4:7], ANSWERS[1].experts.swapaxes(0, 1)
  )
  assert (batch['targets'][1] == -1).all()


def test_few_numbers_of_rows_are_compiled_and_few_rows_are_empty():
  assert [policy_batches.filled(n, 4) for n in (1, 4, 5, 60, 64)] == [4, 4, 8, 60, 64]
  assert policy_batches.filled(65, 4) == 72  # 17 batches are 18
  counts = range(129, 257)
  made = [policy_batches.filled(n, 1) for n in counts]
  assert sorted(set(made)) == list(range(144, 257, 16))
  assert all(n <= new < 1.125 * n for n, new in zip(counts, made))


def test_cut_answers_are_left_out_if_asked():
  cfg = make(objective__policy__truncated='leave_out')
  cut = JUDGED[1]._replace(answer=ANSWERS[1]._replace(ended=False))
  batch, where = policy_batches.rows(cfg, [JUDGED[0], cut], 0)
  row, at = where[1]
  assert (batch['targets'][row, at : at + 3] == -1).all()
  assert batch[policy_loss.WEIGHTS].sum() == pytest.approx(1)


def judged(answers, found, **changes):
  policy = dataclasses.replace(make().objective.policy, group_size=2, std='none', **changes)
  ends = {0: [0, 2], 1: [1]}
  return policy_batches.judged(policy, answers, found, lambda i: ends[i])


def test_groups_are_judged_within_themselves():
  four = [*ANSWERS, answer([4], [5, 3], question=1), answer([4], [3], question=1)]
  found = [worth(1.0), worth(0.0), worth(0.3), worth(0.3)]
  mixed, equal = judged(four, found)
  np.testing.assert_allclose(mixed[0].advantages, [0.5, 0.5, 0.5])
  np.testing.assert_allclose(mixed[1].advantages, [-0.5, -0.5])
  assert policy_batches.is_mixed(mixed) and not policy_batches.is_mixed(equal)
  figures = policy_batches.answer_figures([mixed, equal])
  assert figures['equal_groups'] == 0.5 and figures['reward'] == pytest.approx(0.4)
  assert figures['answer_tokens'] == 2.0 and figures['ended_share'] == 1.0
  assert figures['right_share'] == 0.75


def test_process_supervision_reads_the_steps_and_rejection_the_kind():
  found = [worth(0.5, steps=[(3, 1.0), (9, 0.0)]), worth(1.0, steps=[(5, 1.0)])]
  ((first, second),) = judged(ANSWERS, found, supervision='process')
  np.testing.assert_allclose(first.advantages, [-1 / 3, -2 / 3, -2 / 3])
  np.testing.assert_allclose(second.advantages, [1 / 3, 1 / 3])
  ((first, second),) = judged(ANSWERS, [worth(0.2), worth(0.0)], algorithm='rft')
  assert first.advantages.tolist() == [1, 1, 1] and second.advantages.tolist() == [0, 0]


def test_a_cut_answer_takes_no_part_in_its_group():
  cut = [ANSWERS[0], ANSWERS[1]._replace(ended=False)]
  ((first, second),) = judged(cut, [worth(1.0), worth(0.0)], truncated='leave_out')
  assert not first.advantages.any() and not second.advantages.any()


def test_step_ends_are_the_tokens_that_reach_them():
  pieces = {1: ' ab', 2: 'c', 3: '\nd', 4: 'ef'}

  def decode(ids):
    return ''.join(pieces[i] for i in ids)

  # Behind the space that opens the answer: 'abc' ends with token 1, 'abc\nd' with token 2.
  assert policy_batches.step_ends(decode, [1, 2, 3, 4], [3, 5, 7], 1, False) == [1, 2, 3]
  assert policy_batches.step_ends(decode, [1, 2, 3, 4], [1], 1, False) == [0]
  # What stands behind the text is at the last token: that which ends it, where it has ended.
  assert policy_batches.step_ends(decode, [1, 2, 0], [3, 4], 1, True) == [1, 2]
  assert policy_batches.step_ends(decode, [1, 2], [3, 4], 1, False) == [1, 1]
  assert policy_batches.step_ends(decode, [0], [1], 0, True) == [0]
  # So does the last step, unless something more is said behind it.
  pieces[5] = '\n'
  assert policy_batches.step_ends(decode, [1, 2, 3, 4, 5, 0], [3, 7], 1, True) == [1, 5]
  assert policy_batches.step_ends(decode, [1, 2, 3, 4, 5, 0], [3], 1, True) == [1]


@pytest.mark.parametrize('ended', [False, True])
def test_a_step_ends_with_the_last_byte_of_its_last_character(ended):
  def decode(ids):
    return bytes(i for i in ids if i < 256).decode(errors='replace')

  ids = [*'一。\n二。'.encode(), *([256] if ended else [])]
  assert policy_batches.step_ends(decode, ids, [2, 5], 0, ended) == [5, 12 + ended]


def test_the_gap_between_sampler_and_trainer():
  policy = make().objective.policy
  _, where = policy_batches.rows(make(), JUDGED, 2)
  trainer, own = np.zeros((2, 16), np.float32), np.zeros((2, 16, 2, 2), np.int32)
  for one, (row, at) in zip(JUDGED, where):
    trainer[row, rollouts.places_of(one.answer, at)] = one.answer.log_probs
    n = one.answer.experts.shape[1]
    own[row, at : at + n] = one.answer.experts.swapaxes(0, 1)[..., ::-1]  # an order is no choice
  figures = policy_batches.sampler_figures(policy, JUDGED, where, trainer, own)
  assert set(figures.values()) == {0.0}
  trainer[0, 1] += 0.5
  own[0, 2, 1] = (own[0, 2, 1] + 1) % 8
  figures = policy_batches.sampler_figures(policy, JUDGED, where, trainer, own)
  assert figures['sampler_log_ratio'] == pytest.approx(0.1)
  assert figures['sampler_log_ratio_max'] == pytest.approx(0.5)
  assert figures['sampler_k3'] == pytest.approx((np.exp(0.5) - 1.5) / 5, rel=1e-5)
  assert figures['experts_differ'] == pytest.approx(1 / 7)


def test_answers_that_are_left_out_are_no_gap():
  """They have no targets, so the trainer has no log-probability of them; their experts it has."""
  cfg = make(objective__policy__truncated='leave_out')
  policy = cfg.objective.policy
  cut = [one._replace(answer=one.answer._replace(ended=False)) for one in JUDGED]
  answers = [JUDGED[0], cut[1]]
  batch, where = policy_batches.rows(cfg, answers, 2)
  trainer, own = np.zeros((2, 16), np.float32), np.zeros((2, 16, 2, 2), np.int32)
  for one, (row, at) in zip(answers, where):
    here, n = rollouts.places_of(one.answer, at), one.answer.experts.shape[1]
    learned = batch['targets'][row, here] >= 0
    assert learned.all() == one.answer.ended == learned.any()
    trainer[row, here] = np.where(learned, one.answer.log_probs, 0)
    own[row, at : at + n] = one.answer.experts.swapaxes(0, 1)
  figures = policy_batches.sampler_figures(policy, answers, where, trainer, own)
  assert set(figures.values()) == {0.0}
  row, at = where[1]
  own[row, at, 0] = (own[row, at, 0] + 1) % 8
  figures = policy_batches.sampler_figures(policy, answers, where, trainer, own)
  assert figures['experts_differ'] == pytest.approx(1 / 7) and figures['sampler_k3'] == 0
  figures = policy_batches.sampler_figures(policy, cut, where, trainer, None)
  assert set(figures.values()) == {None}
