"""Chains of sums: a question, its steps one by one, and whether an answer to it is right.

  What is 7 + 5 - 3?      7 + 5 = 12
                          12 - 3 = 9
                          The answer is 9.

How hard it is, is decided by the size of the numbers and by how many operations there are. A number
names a problem; problems with the same question are one, so that a hash of the question may split
them into training and held-out without any question standing in both.
"""

import random
import re
from typing import NamedTuple

# Longer numbers are none: Python refuses to read very long ones.
_NUMBER = r'(-?\d{1,18})'
_STEP = re.compile(rf'\s*{_NUMBER} ([+-]) {_NUMBER} = {_NUMBER}\s*', re.ASCII)
_ANSWER = re.compile(rf'The answer is {_NUMBER}\.(?!\d)', re.ASCII)


class Difficulty(NamedTuple):
  """How hard the questions are."""

  max_value: int = 20  # of a number in a question, and of every value on the way; none is negative
  operations: int = 3  # at most


class Problem(NamedTuple):
  """A question with its solution."""

  question: str
  steps: tuple[str, ...]
  answer: int

  @property
  def solution(self) -> str:
    """The steps, a line each, and the answer."""
    return '\n'.join((*self.steps, f'The answer is {self.answer}.'))

  @property
  def label(self) -> str:
    """Its kind, for figures by domain."""
    return f'{len(self.steps)} operations'


class Step(NamedTuple):
  """A step that a text takes."""

  end: int  # offset of the character behind its last one
  right: bool
  is_answer: bool  # it gives the answer; else it computes


def problem(number: int, difficulty: Difficulty) -> Problem:
  """The problem of that number, the same on every machine and in every Python."""
  rng = random.Random(number)

  def draw(low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))

  most = difficulty.max_value
  value = draw(1, most)
  question, steps = str(value), []
  for _ in range(draw(1, difficulty.operations)):
    plus = value == 0 or value < most and rng.random() < 0.5
    operand = draw(1, most - value) if plus else draw(1, value)
    result = value + operand if plus else value - operand
    sign = '+' if plus else '-'
    question += f' {sign} {operand}'
    steps.append(f'{value} {sign} {operand} = {result}')
    value = result
  return Problem(f'What is {question}?', tuple(steps), value)


def answer_in(text: str) -> int | None:
  """The number that a text gives as its answer, the last one; None if it gives none."""
  found = _ANSWER.findall(text)
  return int(found[-1]) if found else None


def is_right(text: str, solution: str) -> bool:
  """Whether a text gives the answer of a solution."""
  return answer_in(text) is not None and answer_in(text) == answer_in(solution)


def steps(text: str, question: str, solution: str) -> tuple[Step, ...]:
  """The steps that a text takes to an answer, the answer being the last one.

  A line is computed and not compared with the solution: it is right if it is true, goes on from the
  value before it, and does one of the question's operations that no line has done before, in any
  order: a true line about other numbers is a step of another question. Lines of another form are
  no steps, and nor is what stands behind an answer, but for a different answer. That is a wrong
  step, whatever it says, or two tries would be better than one; which answer the text gives is
  decided by the last (`is_right`).
  """
  state, left = _asked(question)
  found, begin, said = [], 0, None
  for line in text.splitlines(keepends=True):
    end = begin + len(line.rstrip())
    begin += len(line)
    given = [int(number) for number in _ANSWER.findall(line)]
    if given:
      if {*given} != {said}:
        right = said is None and len({*given}) == 1 and is_right(line, solution)
        found.append(Step(end, right, True))
      said = given[-1]
      continue
    match = _STEP.fullmatch(line)
    if match is not None and said is None:
      first, sign, operand, result = int(match[1]), match[2], int(match[3]), int(match[4])
      true = result == (first + operand if sign == '+' else first - operand)
      asked = (sign, operand) in left
      if asked:
        left.remove((sign, operand))
      found.append(Step(end, true and first == state and asked, False))
      state = result
  return tuple(found)


def _asked(question: str) -> tuple[int, list[tuple[str, int]]]:
  """(the number that a question begins with, its operations as (sign, operand))."""
  words = question.removeprefix('What is ').rstrip('?').split()
  return int(words[0]), [(sign, int(operand)) for sign, operand in zip(words[1::2], words[2::2])]


def num_right_steps(text: str, question: str) -> tuple[int, int]:
  """(right steps of a text, see `steps`, steps of a text); the answer is none."""
  found = [one.right for one in steps(text, question, '') if not one.is_answer]
  return sum(found), len(found)
