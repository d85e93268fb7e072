"""Process supervision without a model: the checker of the arithmetic chains judges every step."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.data.tasks import arithmetic
from moe_jax.rewards import reward


def steps(
  prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
) -> reward.Reward:
  """The share of steps that are right, and 1 or 0 at the end of each one.

  Steps are the lines up to the one that gives the answer. `a + b = c` is right if it is true, goes
  on from the one before and does an operation of the question that is left (`arithmetic.steps`),
  the answer's line if the answer is, and a line of another form never. A second answer that differs
  is a wrong step too, with what stands before it; the kind is that of the last.
  A text that gives no answer has one more step, a wrong one, behind its end: at the token that ends
  it. If it had none, a policy that is unsure of its answer would earn more by not giving one, a
  word misspelt being enough. Lines are not compared with those of the solution: the operations may
  come in any order, as long as each is one that was asked for. (If any true line counted, a policy
  would answer another question, one that it can.)
  """
  solution = str(example['answer'])
  found = arithmetic.steps(text, str(example['question']), solution)
  known = {one.end: one.right for one in found}
  answered = bool(found) and found[-1].is_answer
  rewards = [(end, float(known.get(end, False))) for end in _ends(text)]
  if answered:
    rewards = [(end, value) for end, value in rewards if end <= found[-1].end]
  else:
    rewards.append((len(text) + 1, 0.0))
  share = sum(value for _, value in rewards) / len(rewards)
  right = arithmetic.is_right(text, solution)
  kind = 'no_answer' if not answered else 'right' if right else 'wrong'
  return reward.Reward(share, {'steps': float(len(rewards)), 'right_steps': share}, kind, rewards)


def _ends(text: str) -> list[int]:
  """Offset of the character behind the last one of every line that says something."""
  found, begin = [], 0
  for line in text.splitlines(keepends=True):
    if line.strip():
      found.append(begin + len(line.rstrip()))
    begin += len(line)
  return found
