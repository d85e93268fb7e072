import math

import numpy as np
import pytest

from moe_jax.post_training import verification
from moe_jax.post_training.verification import Candidate

FIVE = [
  Candidate('3', False, 3, 0.9, (0.9, 0.2, 0.9)),
  Candidate('4', True, 2, 0.8, (0.8, 0.7)),
  Candidate('3', False, 1, 0.1, (0.3,)),
  Candidate('3', False, 1, 0.1, (0.1,)),
  Candidate(None, False, 0, 0.0, ()),
]


def test_each_method_takes_its_own():
  taken = {method: verification.choose(FIVE, method) for method in verification.METHODS}
  assert taken == {
    'self_consistency': 0,  # three votes for 3
    'orm': 0,
    'prm': 1,  # the least of its steps is the largest
    'self_consistency+orm': 0,  # 1.1 against 0.8
    'self_consistency+prm': 1,  # 0.2 + 0.3 + 0.1 against 0.7
  }
  assert verification.choose(FIVE, 'prm', 'last') == 0


def test_scores_of_steps_are_put_together():
  steps = (0.5, 0.8, 0.4)
  found = {how: verification.aggregate(steps, how) for how in verification.AGGREGATIONS}
  assert found == pytest.approx({'min': 0.4, 'last': 0.4, 'product': 0.16})
  assert found['min'] <= np.mean(steps)
  assert verification.aggregate((), 'min') == 0


def test_a_weighted_vote_with_equal_weights_is_a_vote():
  answers = ['2', '1', '1', None, None, None]
  assert verification.vote(answers, [1.0] * 6) == 1
  assert verification.vote([None, None], [1.0, 1.0]) == 0
  assert verification.vote(['5', '6'], [1.0, 1.0]) == 0  # the first of equals


def test_curves_take_the_first_n_of_every_question():
  found = verification.curves([FIVE, FIVE[1:]], [1, 2])
  assert found['prm'] == {1: (1, 2.5), 2: (2, 2.0)}
  assert found['self_consistency'][1] == (1, 2.5)


def test_quality_of_labels_by_the_number_of_completions():
  outcomes = [[False, True], [True, False], [False, False], [False, True]]
  truth = [True, True, True, False]
  found = verification.label_quality(outcomes, truth, [1, 2])
  assert found[1].as_dict() == {'precision': 1, 'recall': 1 / 3, 'accuracy': 1 / 2, 'steps': 4}
  assert found[2].as_dict() == {
    'precision': 2 / 3,
    'recall': 2 / 3,
    'accuracy': 1 / 2,
    'steps': 4,
  }


def test_the_area_under_the_curve():
  assert verification.auc([0.9, 0.8, 0.1], [True, True, False]) == 1
  assert verification.auc([0.1, 0.8, 0.9], [True, True, False]) == 0
  assert verification.auc([0.5, 0.5], [True, False]) == 0.5
  assert verification.auc([0.2, 0.6, 0.4], [False, True, True]) == 1
  assert math.isnan(verification.auc([0.1], [True]))
