"""Rewards that look at a text alone: its answer, its form and its length."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import errors
from moe_jax.rewards import numbers, reward


def answer(
  prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
) -> reward.Reward:
  """1 for the example's answer, exactly, else 0; see `numbers.answer_in` for what a text gives."""
  solution = str(example['answer'])
  given = numbers.answer_in(text, solution)
  return _judged(numbers.is_right(text, solution), given is not None)


def _judged(right: bool, given: bool) -> reward.Reward:
  kind = 'right' if right else 'wrong' if given else 'no_answer'
  return reward.Reward(float(right), {'right': float(right)}, kind)


def has_form(pattern: str = '') -> reward.Function:
  """1 if the text ends with an answer in the form of the example's, and has one only; else 0.

  Args:
    pattern: a regular expression that the whole text is to match instead.

  Raises:
    errors.InputError: the pattern is malformed.
  """
  try:
    expected = re.compile(pattern, re.DOTALL)
  except re.error as e:
    raise errors.InputError(
      f'format(pattern={pattern!r}) must be a regular expression: {e}; correct it'
    ) from e

  def function(
    prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
  ) -> reward.Reward:
    good = expected.fullmatch(text) if pattern else _ends_with_answer(text, str(example['answer']))
    return reward.Reward(
      float(bool(good)), {'format': float(bool(good))}, 'right' if good else 'wrong'
    )

  return function


def _ends_with_answer(text: str, gold: str) -> bool:
  form = numbers.form_of(gold)
  found = numbers.place(text, form)
  if found is None or numbers.times_stated(text, form) != 1:
    return False
  return not text[found.end :].strip(string.whitespace + '.}$')


def length(limit: int = 256, margin: int = 64) -> reward.Function:
  """0 for up to limit - margin tokens, then falling to -1 at the limit (DAPO, equation 13).

  Raises:
    errors.InputError: the margin is not inside of the limit.
  """
  errors.require(
    0 < margin <= limit,
    f'length(limit={limit}, margin={margin}) must have 0 < margin <= limit; change one of them',
  )

  def function(
    prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
  ) -> reward.Reward:
    tokens = len(completion_ids)
    value = -min(max(tokens - (limit - margin), 0) / margin, 1.0)
    return reward.Reward(value, {'tokens': float(tokens)}, 'right' if value == 0 else 'wrong')

  return function
