import pytest

from moe_jax.data.tasks import arithmetic

EASY = arithmetic.Difficulty(max_value=20, operations=3)


def test_known_problems():
  """The same on every machine: worked out once, checked by hand."""
  one = arithmetic.Problem('What is 7 + 5 - 3?', ('7 + 5 = 12', '12 - 3 = 9'), 9)
  assert one.solution == '7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.'
  assert arithmetic.problem(0, EASY) == arithmetic.Problem(
    'What is 17 + 1 - 8 - 4?', ('17 + 1 = 18', '18 - 8 = 10', '10 - 4 = 6'), 6
  )


@pytest.mark.parametrize('difficulty', [EASY, arithmetic.Difficulty(99, 5)])
def test_solutions_are_right(difficulty):
  for number in range(500):
    one = arithmetic.problem(number, difficulty)
    terms = one.question.removeprefix('What is ').removesuffix('?').split()
    value = int(terms[0])
    for sign, operand in zip(terms[1::2], terms[2::2]):
      value += int(operand) if sign == '+' else -int(operand)
      assert 0 <= value <= difficulty.max_value and 1 <= int(operand) <= difficulty.max_value
    assert value == one.answer and 1 <= len(one.steps) <= difficulty.operations
    assert arithmetic.is_right(one.solution, one.solution)
    assert arithmetic.num_right_steps(one.solution, one.question) == (len(one.steps),) * 2


def test_what_is_wrong():
  solution, question = '7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.', 'What is 7 + 5 - 3?'
  assert arithmetic.is_right('It is so. The answer is 9.', solution)
  assert not arithmetic.is_right('The answer is 8.', solution)
  assert not arithmetic.is_right('9', solution)
  assert not arithmetic.is_right('The answer is 9.5', solution)  # the beginning of another number
  assert arithmetic.is_right('The answer is 9.\nThe answer is 9.', solution)
  assert not arithmetic.is_right('The answer is 9.\nThe answer is 3.', solution)
  # A false equation, then a true one that goes on from it; then one that goes on from nothing.
  assert arithmetic.num_right_steps('7 + 5 = 13\n13 - 3 = 10', question) == (1, 2)
  assert arithmetic.num_right_steps('7 + 5 = 12\n11 - 3 = 8\nso', question) == (1, 2)
  # What is computed behind an answer is no step, whatever answers stand around it.
  more = f'{solution}\n9 + 0 = 9\nThe answer is 3.\n1 + 1 = 3'
  assert arithmetic.num_right_steps(more, question) == (2, 2)
