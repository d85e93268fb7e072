"""Process supervision without a model: the checker of the arithmetic chains judges every step."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.data.tasks import arithmetic
from moe_jax.rewards import reward


def steps(
  prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
) -> reward.Reward:
  """The share of steps that are right, and 1 or 0 at the end of each one.

  Steps are the lines `a + b = c`, right if true and if they go on from the one before, and the line
  that gives the answer, right if the answer is. What follows an answer is no step. Lines are
  computed and not compared with those of the solution, so a detour is right too; a detour that goes
  nowhere is as well, so the number of steps is to be watched.
  """
  found = arithmetic.steps(text, str(example['question']), str(example['answer']))
  rewards = [(one.end, float(one.right)) for one in found]
  share = sum(value for _, value in rewards) / len(rewards) if rewards else 0.0
  answered = bool(found) and found[-1].is_answer
  kind = 'no_answer' if not answered else 'right' if found[-1].right else 'wrong'
  return reward.Reward(share, {'steps': float(len(rewards)), 'right_steps': share}, kind, rewards)
