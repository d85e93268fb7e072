import numpy as np
import pytest

from moe_jax.post_training import advantages


@pytest.mark.parametrize('std', ['sample', 'population'])
def test_outcomes_are_centred_and_scaled(std):
  got = advantages.outcome(np.array([1.0, 0, 0, 1]), std)
  spread = np.std([1, 0, 0, 1], ddof=1 if std == 'sample' else 0)
  np.testing.assert_allclose(got, np.array([0.5, -0.5, -0.5, 0.5]) / spread, rtol=1e-5)
  assert abs(got.sum()) < 1e-9


def test_without_a_deviation_only_the_mean_is_taken_away():
  np.testing.assert_allclose(advantages.outcome(np.array([3.0, 0, 0]), 'none'), [2, -1, -1])


@pytest.mark.parametrize('std', ['sample', 'population', 'none'])
def test_equal_rewards_give_exactly_nothing(std):
  assert not advantages.outcome(np.full(5, 0.1), std).any()


def test_an_answer_that_is_left_out_moves_no_other():
  got = advantages.outcome(np.array([1.0, np.nan, 0.0]), 'none')
  np.testing.assert_allclose(got, [0.5, 0, -0.5])


def test_the_papers_reverse_sum_over_steps_of_the_whole_group():
  """Steps worth 1, 0 and 1: mean 2/3. A token gets the steps that end at it or later."""
  steps = [[(1, 1.0), (3, 0.0)], [(2, 1.0)]]
  first, second = advantages.process(steps, [5, 3], 'none')
  np.testing.assert_allclose(first, [-1 / 3, -1 / 3, -2 / 3, -2 / 3, 0])
  np.testing.assert_allclose(second, [1 / 3, 1 / 3, 1 / 3])
  scaled, _ = advantages.process(steps, [5, 3], 'sample')
  np.testing.assert_allclose(scaled, first / np.std([1, 0, 1], ddof=1), rtol=1e-5)


def test_one_step_at_the_end_of_each_answer_is_an_outcome():
  values, lengths = [1.0, 0.0, 0.0], [4, 2, 3]
  steps = [[(n - 1, value)] for n, value in zip(lengths, values)]
  want = advantages.outcome(np.array(values), 'sample')
  for got, value in zip(advantages.process(steps, lengths, 'sample'), want):
    np.testing.assert_allclose(got, value)


def test_an_answer_without_a_step_has_no_advantage():
  found = advantages.process([[], [(0, 1.0)], [(1, 0.0)]], [2, 1, 2], 'none')
  np.testing.assert_array_equal(found[0], [0, 0])
