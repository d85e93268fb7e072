"""Small programs: what a function shall do, the function, and tests that the question keeps hidden.

  def f(x):                                  def f(x):
    "Add 3, then negate."                      x = x + 3
                                               x = -x
                                               return x

How hard it is, is decided by how many operations there are, by their numbers, and by whether x is a
number only or a list as well. Tests follow from the question alone: their arguments from its hash,
their values from what its words mean here. No program is run to know them.
"""

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.data import hashing

ENTRY = 'f'
NUM_TESTS = 10
_QUESTION = re.compile(r'def f\((xs?)\):\n  "([^"]*)\."')


class Difficulty(NamedTuple):
  """How hard the questions are."""

  operations: int = 2  # at most
  max_value: int = 9  # of a number in a question
  kinds: int = 2  # of arguments: 1 is numbers, 2 is numbers and lists of them


class Operation(NamedTuple):
  """Something that a function does with its argument."""

  words: str  # with {n} for a number, if it has one
  code: str
  apply: Callable[[Any, int], Any]


def _kept(words: str, condition: str, holds: Callable[[int, int], bool]) -> Operation:
  code = f'[x for x in xs if {condition}]'
  return Operation(words, code, lambda xs, n: [x for x in xs if holds(x, n)])


NUMBERS = (
  Operation('add {n}', 'x + {n}', lambda x, n: x + n),
  Operation('subtract {n}', 'x - {n}', lambda x, n: x - n),
  Operation('multiply by {n}', 'x * {n}', lambda x, n: x * n),
  Operation('divide by {n} rounding down', 'x // {n}', lambda x, n: x // n),
  Operation('take the remainder by {n}', 'x % {n}', lambda x, n: x % n),
  Operation('raise to at least {n}', 'max(x, {n})', max),
  Operation('lower to at most {n}', 'min(x, {n})', min),
  Operation('subtract from {n}', '{n} - x', lambda x, n: n - x),
  Operation('negate', '-x', lambda x, n: -x),
  Operation('drop the sign', 'abs(x)', lambda x, n: abs(x)),
)
LISTS = (
  Operation('reverse', 'xs[::-1]', lambda xs, n: xs[::-1]),
  Operation('sort', 'sorted(xs)', lambda xs, n: sorted(xs)),
  Operation('drop the first {n}', 'xs[{n}:]', lambda xs, n: xs[n:]),
  Operation('keep the first {n}', 'xs[:{n}]', lambda xs, n: xs[:n]),
  Operation('append {n}', 'xs + [{n}]', lambda xs, n: [*xs, n]),
  Operation('append the sum', 'xs + [sum(xs)]', lambda xs, n: [*xs, sum(xs)]),
  Operation('append the length', 'xs + [len(xs)]', lambda xs, n: [*xs, len(xs)]),
  Operation('add {n} to each', '[x + {n} for x in xs]', lambda xs, n: [x + n for x in xs]),
  Operation('multiply each by {n}', '[x * {n} for x in xs]', lambda xs, n: [x * n for x in xs]),
  _kept('keep those above {n}', 'x > {n}', lambda x, n: x > n),
  _kept('keep those below {n}', 'x < {n}', lambda x, n: x < n),
  _kept('keep even ones', 'x % 2 == 0', lambda x, n: x % 2 == 0),
)
_OPERATIONS = {'x': NUMBERS, 'xs': LISTS}
_EDGES = {'x': (0, 1, -1, 2), 'xs': ([], [3], [4, 2, 4, -1], [-6, 9, 0, 7, 2, 8, 3, 10, 1, 5, -8])}


class Problem(NamedTuple):
  """A question, and the operations that answer it."""

  argument: str  # 'x' or 'xs'
  steps: tuple[tuple[Operation, int], ...]  # with their numbers

  @property
  def question(self) -> str:
    """The head of the function with its docstring."""
    words = ', then '.join(operation.words.format(n=n) for operation, n in self.steps)
    return f'def f({self.argument}):\n  "{words[0].upper()}{words[1:]}."'

  @property
  def solution(self) -> str:
    """The function."""
    name = self.argument
    lines = [f'  {name} = {operation.code.format(n=n)}' for operation, n in self.steps]
    return '\n'.join([f'def f({name}):', *lines, f'  return {name}'])

  @property
  def label(self) -> str:
    """Its kind, for figures by domain."""
    return f'{"numbers" if self.argument == "x" else "lists"}, {len(self.steps)} operations'

  def value(self, argument: Any) -> Any:
    """What the function returns."""
    for operation, n in self.steps:
      argument = operation.apply(argument, n)
    return argument


def problem(number: int, difficulty: Difficulty) -> Problem:
  """The problem of that number, the same on every machine and in every Python."""
  rng = random.Random(number)
  argument = ('x', 'xs')[_draw(rng, 0, min(difficulty.kinds, 2) - 1)]
  known = _OPERATIONS[argument]
  steps = []
  for _ in range(_draw(rng, 1, difficulty.operations)):
    operation = known[_draw(rng, 0, len(known) - 1)]
    # 1 would make a division no operation.
    steps.append((operation, _draw(rng, min(2, difficulty.max_value), difficulty.max_value)))
  return Problem(argument, tuple(steps))


def _draw(rng: random.Random, low: int, high: int) -> int:
  return low + int(rng.random() * (high - low + 1))


def from_question(question: str) -> Problem:
  """The problem whose question that is.

  Raises:
    ValueError: it is none of this task's.
  """
  match = _QUESTION.fullmatch(question)
  if match is None:
    raise ValueError(f'{question!r} is no question of the task of programs')
  argument, text = match.groups()
  words = text[:1].lower() + text[1:]
  steps = tuple(_step(part, argument) for part in words.split(', then '))
  return Problem(argument, steps)


def _step(words: str, argument: str) -> tuple[Operation, int]:
  numbers = re.findall(r'\d+', words)
  n = int(numbers[0]) if numbers else 0
  for operation in _OPERATIONS[argument]:
    if operation.words.format(n=n) == words:
      return operation, n
  raise ValueError(f'{words!r} is no operation of the task of programs')


def tests(question: str) -> list[list[Any]]:
  """Hidden tests of a question: [[argument], value] each, the same ones every time.

  Raises:
    ValueError: it is no question of this task.
  """
  one = from_question(question)
  rng = random.Random(hashing.hexdigest('tests of a program', question))
  given = list(_EDGES[one.argument])
  while len(given) < NUM_TESTS:
    if one.argument == 'x':
      given.append(_draw(rng, -99, 99))
    else:
      given.append([_draw(rng, -20, 20) for _ in range(_draw(rng, 2, 12))])
  return [[[argument], one.value(argument)] for argument in given]
