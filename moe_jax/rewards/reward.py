"""The value of a completion, and what a function that gives one looks like.

A reward is a pure function of (prompt, completion ids, text, example). The example is what the task
knows of the question, JSON values only: 'question' and 'answer' (a solution as text), and for
programs 'entry' and 'tests'.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Of an answer: it is right, wrong or not there; or its check ended in an error, or at a limit of
# time or of memory.
KINDS = ('right', 'wrong', 'no_answer', 'error', 'time', 'memory')


class Reward(NamedTuple):
  """What a completion is worth."""

  value: float
  parts: Mapping[str, float]  # what the value is made of, to be logged
  kind: str  # one of KINDS
  # (offset in the text of the character behind a step's last one, reward of the step), in order;
  # an offset behind the text stands for the token that ends the answer. None without process
  # supervision.
  step_rewards: Sequence[tuple[int, float]] | None = None


class Item(NamedTuple):
  """What a reward is given for."""

  prompt: str
  completion_ids: Sequence[int]  # without the end token
  text: str  # of the completion
  example: Mapping[str, Any]


Function = Callable[[str, Sequence[int], str, Mapping[str, Any]], Reward]
