"""Scores and answers of candidates: whose they are, and in which form."""

import numpy as np
import pytest

from moe_jax.data import conversations
from moe_jax.post_training import answers, candidates, solutions, step_scores, verification
from moe_jax.rewards import text as text_lib


def sampled(text, right, gold='The answer is 1/2.'):
  question = answers.Question((conversations.Turn('user', 'What is 1 / 2?', False),), gold)
  return solutions.Sampled(question, [1], [2], text, 0, True, right)


def test_scores_stay_with_their_solutions(monkeypatch):
  groups = [
    [sampled('1 + 1 = 2\nThe answer is 2/4.', True), sampled('The answer is 3.', False)],
    [sampled('no idea', False), sampled('', False)],
  ]

  def score(judge, texts, tell_unread):
    if judge == 'steps':
      return [np.arange(len(one.ends)) / 10 + len(one.text) for one in texts]
    return [np.array([len(one.text) / 100]) if one.ends else np.array([]) for one in texts]

  monkeypatch.setattr(step_scores, 'score', score)
  found = candidates.judged(groups, {'prm': 'steps', 'orm': 'solutions'})
  assert [len(group) for group in found] == [2, 2]
  first, second, third, last = [one for group in found for one in group]
  assert first.answer == '1/2' and first.right and first.steps == 2
  assert first.prm == pytest.approx((28, 28.1)) and first.orm == pytest.approx(0.28)
  assert second.answer == '3' and not second.right and second.orm == pytest.approx(0.16)
  assert third.answer is None and third.steps == 1
  assert last.answer is None and last.prm == () and last.orm == 0.0


@pytest.mark.parametrize(
  'gold, right, wrong',
  [
    ('5', ['The answer is 5. (3 steps)', r'\boxed{5} after 2 tries', '5.0'], ['3', r'\boxed{3}']),
    ('Paris', ['Paris', ' Paris\n', 'Paris'], ['Rome', 'Berlin']),
    (r'\boxed{x+1}', [r'so \boxed{x+1}', r'\boxed{ x+1 }', r'\boxed{x+1}.'], [r'\boxed{x}', 'x+1']),
    ('The answer is 1/2.', ['The answer is 0.5', 'The answer is 50%.'], ['The answer is 2.5kg']),
  ],
)
def test_a_vote_is_for_what_is_judged(monkeypatch, gold, right, wrong):
  """Right solutions vote together and no wrong one with them, so the majority is right."""
  texts = [*wrong, *right]
  rights = [text_lib.answer('', (), one, {'answer': gold}).kind == 'right' for one in texts]
  assert rights == [False] * len(wrong) + [True] * len(right)
  group = [sampled(one, is_right, gold) for one, is_right in zip(texts, rights)]
  monkeypatch.setattr(
    step_scores, 'score', lambda judge, texts, tell_unread: [np.ones(1)] * len(texts)
  )
  (found,) = candidates.judged([group], {'prm': '', 'orm': ''})
  votes = {one.answer for one in found if one.right}
  assert len(votes) == 1 and None not in votes
  assert not votes & {one.answer for one in found if not one.right}
  assert found[verification.choose(found, 'self_consistency')].right
