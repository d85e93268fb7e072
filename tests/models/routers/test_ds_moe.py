import numpy as np
import pytest

from moe_jax.config import moe_config
from tests.models.routers import routes


@pytest.mark.parametrize('rule', moe_config.INFERENCE_RULES)
def test_training_weighs_every_expert_whatever_the_rule(rule):
  got = routes.ds_moe(rule, train=True)
  np.testing.assert_array_equal(got.expert_idx, np.broadcast_to(np.arange(4), (1, 3, 4)))
  np.testing.assert_allclose(got.gates, routes.PROBS, **routes.EXACT)


@pytest.mark.parametrize(
  'rule, want',
  [
    ('all', [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]),
    # 4 * score > .9: score > .225.
    ('threshold', [[0, 1, 4, 4], [4, 4, 2, 3], [4, 1, 4, 3]]),
    # K = 1: the best.
    ('topk', [[0, 4, 4, 4], [4, 4, 4, 3], [4, 1, 4, 4]]),
    # Three best (token, expert) pairs of three tokens: .5, .45, .4.
    ('threshold_topk', [[0, 4, 4, 4], [4, 4, 4, 3], [4, 1, 4, 4]]),
  ],
)
def test_inference_rules_by_hand(rule, want):
  got = routes.ds_moe(rule, num_experts_per_tok=1, options__inference_threshold=0.9)
  np.testing.assert_array_equal(got.expert_idx[0], want)
  # Not renormalised.
  np.testing.assert_allclose(
    got.gates[0], np.where(np.array(want) < 4, routes.PROBS[0], 0), **routes.EXACT
  )


def test_threshold_topk_is_a_budget_of_the_batch_and_not_of_a_token():
  # K = 2 of three tokens, the last padding: the 4 best pairs of two tokens, .4 .3 and .45 .25.
  probs = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45], [0.97, 0.01, 0.01, 0.01]]])
  got = routes.ds_moe('threshold_topk', np.log(probs), mask=[[1, 1, 0]])
  np.testing.assert_array_equal(got.expert_idx[0], [[0, 1, 4, 4], [4, 4, 2, 3], [4] * 4])
  # The same real token twice as sure takes one of the other's: .7 .29, .45 .25 -> K = 1.5 ...
  probs[0, 0] = [0.5, 0.3, 0.19, 0.01]
  probs[0, 1] = [0.29, 0.24, 0.24, 0.23]
  got = routes.ds_moe('threshold_topk', np.log(probs), mask=[[1, 1, 0]])
  # .5 .3 .29 and one of the two .24: a tie takes both.
  np.testing.assert_array_equal(got.expert_idx[0], [[0, 1, 4, 4], [0, 1, 2, 4], [4] * 4])


def test_topk_rule_breaks_ties_like_topk():
  got = routes.ds_moe('topk', np.zeros((1, 1, 4)))
  np.testing.assert_array_equal(got.expert_idx, [[[0, 1, 4, 4]]])
