import random

import pytest

from moe_jax.data.tasks import programs

EASY = programs.Difficulty()


def test_known_problems():
  """The same on every machine: worked out once, checked by hand."""
  one = programs.problem(0, EASY)
  assert one.question == 'def f(xs):\n  "Append the sum, then append the length."'
  assert one.solution == 'def f(xs):\n  xs = xs + [sum(xs)]\n  xs = xs + [len(xs)]\n  return xs'
  assert one.label == 'lists, 2 operations'
  found = programs.tests(one.question)
  assert found[:3] == [[[[]], [0, 1]], [[[3]], [3, 3, 2]], [[[4, 2, 4, -1]], [4, 2, 4, -1, 9, 5]]]


@pytest.mark.parametrize('difficulty', [EASY, programs.Difficulty(4, 30, 1)])
def test_solutions_pass_their_tests(difficulty):
  """What the words mean here is what the code does."""
  for number in range(400):
    one = programs.problem(number, difficulty)
    assert 1 <= len(one.steps) <= difficulty.operations
    assert all(n <= difficulty.max_value for _, n in one.steps)
    assert difficulty.kinds == 2 or one.argument == 'x'
    space = {}
    exec(one.solution, space)
    found = programs.tests(one.question)
    assert len(found) == programs.NUM_TESTS
    for arguments, value in found:
      assert space[programs.ENTRY](*arguments) == value


def test_every_operation_is_read_from_its_words():
  for argument, known in (('x', programs.NUMBERS), ('xs', programs.LISTS)):
    for operation in known:
      one = programs.Problem(argument, ((operation, 7), (known[0], 3)))
      again = programs.from_question(one.question)
      assert (again.question, again.solution) == (one.question, one.solution)


@pytest.mark.parametrize(
  'question',
  ['What is 7 + 5?', 'def f(x):\n  "Cube."', 'def f(xs):\n  "Negate."', 'def f(x):\n  "Add 3"'],
)
def test_other_questions_have_no_tests(question):
  with pytest.raises(ValueError, match='of the task of programs'):
    programs.tests(question)


def test_tests_tell_programs_apart():
  """A program with one operation changed passes the tests only where it does the same on all that
  is tried here: on 100 arguments more."""
  rng, passed, different = random.Random(0), 0, 0
  for number in range(200):
    one = programs.problem(number, EASY)
    steps = list(one.steps)
    operation, n = steps[-1]
    known = programs.NUMBERS if one.argument == 'x' else programs.LISTS
    steps[-1] = (rng.choice(known), n) if number % 2 else (operation, n % 9 + 1)
    other = programs.Problem(one.argument, tuple(steps))
    more = [rng.randint(-99, 99) for _ in range(100)]
    if one.argument == 'xs':
      more = [[rng.randint(-20, 20) for _ in range(rng.randint(0, 14))] for _ in range(100)]
    if any(one.value(x) != other.value(x) for x in more):
      different += 1
      passed += all(other.value(*a) == value for a, value in programs.tests(one.question))
  assert different > 100 and passed <= 0.03 * different, (passed, different)
