from moe_jax.rewards import reward


def test_a_reward_has_no_steps_unless_they_are_given():
  assert reward.Reward(1.0, {}, 'right').step_rewards is None
  assert {'right', 'wrong', 'no_answer', 'error', 'time', 'memory'} == set(reward.KINDS)
