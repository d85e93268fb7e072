"""What PPO learns from: rewards at the right tokens, GAE against closed forms, whitening."""

import dataclasses

import numpy as np
import pytest

from moe_jax.post_training import advantages, policy_batches, rollouts, value_targets
from moe_jax.rewards import steps
from moe_jax.training import policy_loss
from tests import tiny
from tests.post_training.test_policy_batches import ANSWERS, answer, worth
from tests.training.test_policy_loss import RUN

REWARDS = np.array([0.5, -0.25, 0.0, 2.0])
VALUES = np.array([1.0, 0.25, -0.5, 0.75])
ENDS = {0: [0, 2], 1: [1]}


def make(**changes):
  given = {f'objective__policy__{key}': value for key, value in changes.items()}
  ppo = {'objective__policy__algorithm': 'ppo', 'train__batch_size': 2}
  return tiny.make(**(RUN | ppo | {'objective__policy__kl_weight': 0.0} | given))


def plain_loop(rewards, values, behind, gamma, lam):
  """The sum of equation 16, term by term."""
  after = [*values[1:], behind]
  errors = [r + gamma * b - v for r, b, v in zip(rewards, after, values)]
  return [
    sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors)))
    for t in range(len(errors))
  ]


@pytest.mark.parametrize('behind', [0.0, 3.0])
@pytest.mark.parametrize(
  'gamma, lam', [(1.0, 0.95), (0.9, 0.5), (0.9, 1.0), (0.9, 0.0), (0.0, 1.0)]
)
def test_advantages_are_the_sums_of_errors(gamma, lam, behind):
  got = advantages.generalised(REWARDS, VALUES, behind, gamma, lam)
  np.testing.assert_allclose(got, plain_loop(REWARDS, VALUES, behind, gamma, lam), rtol=1e-12)
  if lam == 1:
    powers = gamma ** np.arange(5)
    returns = [(powers[: 5 - t] * [*REWARDS[t:], behind]).sum() for t in range(4)]
    np.testing.assert_allclose(got, returns - VALUES, rtol=1e-12)
  if lam == 0:
    np.testing.assert_allclose(
      got, REWARDS + gamma * np.array([*VALUES[1:], behind]) - VALUES, rtol=1e-12
    )


def test_whitening_has_mean_0_and_deviation_1_under_its_weights():
  values, weights = np.array([1.0, 4.0, -2.0, 1e9]), np.array([2.0, 1.0, 1.0, 0.0])
  got = advantages.whitened(values, weights)
  assert got[3] == 0
  np.testing.assert_allclose((weights * got).sum(), 0, atol=1e-12)
  np.testing.assert_allclose((weights * got**2).sum() / weights.sum(), 1, rtol=1e-5)
  # A weight of 2 is the value twice; mean (1 + 1 + 4 - 2) / 4 = 1, variance (9 + 9) / 4.
  np.testing.assert_allclose(got[:3], [0, 3 / np.sqrt(4.5), -3 / np.sqrt(4.5)], rtol=1e-5, atol=0)
  assert not advantages.whitened(np.full(3, 7.0), np.ones(3)).any()
  assert not advantages.whitened(values, np.zeros(4)).any()


def token_rewards(found, answers=ANSWERS, **changes):
  return value_targets.rewards(make(**changes).objective.policy, answers, found, lambda i: ENDS[i])


def test_the_outcome_stands_at_the_last_token_and_a_cut_answer_has_it_if_kept():
  first, second = token_rewards([worth(1.0), worth(0.5)])
  assert first.tolist() == [0, 0, 1] and second.tolist() == [0, 0.5]
  cut = [ANSWERS[0]._replace(ended=False), ANSWERS[1]]
  for truncated, last in (('keep', 1.0), ('leave_out', 0.0), ('bootstrap', 0.0)):
    first, _ = token_rewards([worth(1.0), worth(0.5)], cut, truncated=truncated)
    assert first.tolist() == [0, 0, last]


def test_steps_are_rewarded_where_they_end_and_less_their_mean():
  found = [worth(1.0, steps=[(3, 0.75), (9, 0.25)]), worth(1.0, steps=[(5, 0.5)])]
  process = {'supervision': 'process', 'ppo__center_steps': False}
  first, second = token_rewards(found, **process)
  assert first.tolist() == [0.75, 0, 0.25] and second.tolist() == [0, 0.5]
  first, second = token_rewards(found, supervision='process')
  assert first.tolist() == [0.25, 0, -0.25] and second.tolist() == [0, 0]
  # What a step that is cut off has earned stands; its answer's mean is over those that count.
  cut = [ANSWERS[0]._replace(ended=False), ANSWERS[1]]
  first, _ = token_rewards(found, cut, truncated='bootstrap', **process)
  assert first.tolist() == [0.75, 0, 0.25]
  first, second = token_rewards(found, cut, truncated='leave_out', supervision='process')
  assert not first.any() and not second.any()


@pytest.mark.parametrize(
  'text, came',
  [
    ('7 + 5 = 12\n12 - 3', [(10, 1.0)]),  # neither the line that is cut nor an answer
    ('7 + 5 = 12\n', [(10, 1.0)]),
    ('7 + 5 = 12 \r\n', [(10, 1.0)]),
    ('7 + 5 = 12', []),
    ('7 + 5 = 13\n13 - 3 = 1', [(10, 0.0)]),
    ('The answer is 9.', []),  # it may still be 9.5
    ('', []),
  ],
)
def test_an_answer_that_goes_on_is_rewarded_for_the_steps_that_it_has_completed(text, came):
  example = {'question': 'What is 7 + 5 - 3?', 'answer': 'The answer is 9.'}
  found, policy = steps.steps('', (), text, example), make(truncated='bootstrap').objective.policy
  cut = ANSWERS[0]._replace(ended=False)
  assert value_targets.of_what_came(policy, cut, text, found).step_rewards == came
  assert value_targets.of_what_came(policy, ANSWERS[0], text, found) == found
  kept = dataclasses.replace(policy, truncated='keep')
  assert value_targets.of_what_came(kept, cut, text, found) == found
  assert value_targets.of_what_came(policy, cut, text, worth(1.0)) == worth(1.0)


def filled(found, *, answers=ANSWERS, values=None, reference=None, **changes):
  """(batch, where, figures) of answers with rewards of their own."""
  cfg = make(**changes)
  policy = dataclasses.replace(cfg.objective.policy, group_size=len(answers))
  (group,) = policy_batches.judged(policy, answers, found, lambda i: ENDS[i])
  batch, where = policy_batches.rows(cfg, group, 2)
  shape = batch['tokens'].shape
  batch[policy_loss.OLD] = np.full(shape, -1.0, np.float32)
  batch[policy_loss.REFERENCE] = np.full(shape, reference or -1.0, np.float32)
  values = np.zeros(shape) if values is None else values(shape)
  rewards = [one.rewards for one in group]
  figures = value_targets.fill(policy, batch, answers, rewards, where, values)
  return batch, where, figures


def at(batch, where, key, number, answers=ANSWERS):
  row, first = where[number]
  return batch[key][row, rollouts.places_of(answers[number], first)]


def test_with_nothing_expected_advantages_are_whitened_rewards():
  batch, where, figures = filled([worth(1.0), worth(0.0)], ppo__gae_lambda=1.0)
  # Three tokens of 1, two of 0: mean 0.6, deviation sqrt(0.24).
  first = at(batch, where, policy_loss.ADVANTAGES, 0)
  second = at(batch, where, policy_loss.ADVANTAGES, 1)
  np.testing.assert_allclose(first, 0.4 / np.sqrt(0.24), rtol=1e-5)
  np.testing.assert_allclose(second, -0.6 / np.sqrt(0.24), rtol=1e-5)
  assert at(batch, where, policy_loss.RETURNS, 0).tolist() == [1, 1, 1]
  assert not batch[policy_loss.VALUES].any()
  assert figures == pytest.approx(
    {'explained_variance': 0.0, 'advantage_mean': 0.6, 'return_mean': 0.6}
  )
  unwritten = batch['targets'] < 0
  for key in (policy_loss.ADVANTAGES, policy_loss.RETURNS, policy_loss.VALUES):
    assert not batch[key][unwritten].any()


def test_the_distance_to_the_reference_is_taken_from_every_reward():
  batch, where, _ = filled(
    [worth(1.0), worth(0.0)], kl_weight=0.1, reference=-3.0, ppo__gae_lambda=1.0, ppo__gamma=1.0
  )
  # log p_old - log q = 2 at each token: -0.2 each.
  np.testing.assert_allclose(at(batch, where, policy_loss.RETURNS, 0), [0.4, 0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(at(batch, where, policy_loss.RETURNS, 1), [-0.4, -0.2], rtol=1e-6)


def ramp(shape):
  return np.arange(np.prod(shape), dtype=float).reshape(shape) / 10


def test_returns_are_advantages_with_values_of_the_places_that_draw():
  changes = {'ppo__gamma': 0.9, 'ppo__gae_lambda': 0.5}
  batch, where, figures = filled([worth(1.0), worth(0.5)], values=ramp, **changes)
  raw = []
  for number, rewards in enumerate(([0, 0, 1.0], [0, 0.5])):
    row, first = where[number]
    # The answer's first token is drawn at the question's last one, the second of two.
    own = ramp(batch['tokens'].shape)[row, first + 1 : first + 1 + len(rewards)]
    raw.append(np.array(plain_loop(rewards, own, 0.0, 0.9, 0.5)))
    np.testing.assert_allclose(at(batch, where, policy_loss.VALUES, number), own, rtol=1e-6)
    np.testing.assert_allclose(
      at(batch, where, policy_loss.RETURNS, number), raw[-1] + own, rtol=1e-5
    )
  flat = np.concatenate(raw)
  want = (flat - flat.mean()) / flat.std()
  got = [at(batch, where, policy_loss.ADVANTAGES, number) for number in (0, 1)]
  np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-4)
  returns = np.concatenate([at(batch, where, policy_loss.RETURNS, n) for n in (0, 1)])
  assert figures['explained_variance'] == pytest.approx(1 - flat.var() / returns.var(), rel=1e-4)
  assert figures['advantage_mean'] == pytest.approx(flat.mean())


def test_a_cut_answer_goes_on_with_the_value_behind_its_last_token():
  cut = [ANSWERS[0]._replace(ended=False), ANSWERS[1]]
  changes = {'truncated': 'bootstrap', 'ppo__gae_lambda': 1.0}
  batch, where, _ = filled([worth(1.0), worth(0.5)], answers=cut, values=ramp, **changes)
  row, first = where[0]
  # Question [1, 2] and answer [5, 6, 3] are all read; the last one has no target.
  np.testing.assert_array_equal(batch['tokens'][row, first : first + 5], [1, 2, 5, 6, 3])
  np.testing.assert_array_equal(batch['targets'][row, first : first + 5], [-1, 5, 6, 3, -1])
  behind = ramp(batch['tokens'].shape)[row, first + 4]
  np.testing.assert_allclose(at(batch, where, policy_loss.RETURNS, 0, cut), [behind] * 3, rtol=1e-5)
  segments = batch['segment_ids'][row, first : first + 5]
  assert (segments == segments[0]).all() and segments[0] > 0
  np.testing.assert_array_equal(batch['positions'][row, first : first + 5], np.arange(5))
  np.testing.assert_allclose(at(batch, where, policy_loss.RETURNS, 1, cut), [0.5, 0.5], rtol=1e-5)


def test_answers_that_are_left_out_whiten_nothing():
  third = answer([4, 1], [5, 6, 7], ended=False, seed=2)
  found = [worth(1.0), worth(0.0), worth(100.0)]

  def constant(shape):
    return np.full(shape, 0.3)

  both, where, figures = filled(found[:2], values=constant, truncated='leave_out')
  with_cut = filled(found, answers=[*ANSWERS, third], values=constant, truncated='leave_out')
  assert with_cut[2] == pytest.approx(figures)
  for number in (0, 1):
    np.testing.assert_allclose(
      at(with_cut[0], with_cut[1], policy_loss.ADVANTAGES, number),
      at(both, where, policy_loss.ADVANTAGES, number),
      rtol=1e-6,
    )
  row, first = with_cut[1][2]
  left_out = rollouts.places_of(third, first)
  assert not with_cut[0][policy_loss.ADVANTAGES][row, left_out].any()
  assert not with_cut[0][policy_loss.WEIGHTS][row, left_out].any()


def test_groups_of_ppo_are_mixed_by_what_they_earn():
  policy = dataclasses.replace(make().objective.policy, group_size=2)
  (mixed,) = policy_batches.judged(policy, ANSWERS, [worth(1.0), worth(0.5)], ENDS.get)
  (equal,) = policy_batches.judged(policy, ANSWERS, [worth(1.0), worth(1.0)], ENDS.get)
  assert policy_batches.is_mixed(mixed) and not policy_batches.is_mixed(equal)
  assert policy_batches.answer_figures([mixed, equal])['equal_groups'] == 0.5
  alone = dataclasses.replace(policy, group_size=1)
  groups = policy_batches.judged(alone, ANSWERS, [worth(1.0), worth(0.5)], ENDS.get)
  assert len(groups) == 2 and policy_batches.answer_figures(groups)['equal_groups'] is None
