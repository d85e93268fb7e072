r"""Answers in LaTeX, compared by math-verify (extra `math`): 1/2, 0.5 and \frac{1}{2} are one.

Its own limit of time works by a signal, which threads never see; it is turned off, since a pool has
a clock for every item. An error of the library is an error here, and no wrong answer.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import errors
from moe_jax.rewards import reward


def math_verify() -> reward.Function:
  """1 if a text's answer has the value of the example's, else 0.

  Raises:
    errors.InputError: the library is not installed.
  """
  try:
    library = importlib.import_module('math_verify')
  except ImportError as e:
    raise errors.InputError(
      "the reward 'math_verify' needs the package math-verify: pip install 'moe_jax[math]'; or "
      "take the reward 'answer', which reads numbers and fractions"
    ) from e
  # It warns at every call that it has no limit of time.
  logging.getLogger('math_verify').setLevel(logging.ERROR)

  def judge(
    prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
  ) -> reward.Reward:
    gold = library.parse(str(example['answer']), parsing_timeout=None, raise_on_error=True)
    if not gold:
      raise ValueError(f'math-verify finds no answer in {example["answer"]!r}')
    found = library.parse(text, parsing_timeout=None)
    right = bool(found) and library.verify(gold, found, timeout_seconds=None, raise_on_error=True)
    kind = 'right' if right else 'wrong' if found else 'no_answer'
    return reward.Reward(float(right), {'right': float(right)}, kind)

  return judge
