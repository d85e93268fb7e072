import itertools

import pytest

from moe_jax.data.tasks import arithmetic
from moe_jax.rewards import steps
from moe_jax.rewards import text as text_lib

EXAMPLE = {
  'question': 'What is 7 + 5 - 3?',
  'answer': '7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.',
}


def judged(text):
  found = steps.steps('', (), text, EXAMPLE)
  return found.kind, [value for _, value in found.step_rewards], found.value


def test_every_solution_is_right():
  for number in range(100):
    one = arithmetic.problem(number, arithmetic.Difficulty(50, 4))
    example = {'question': one.question, 'answer': one.solution}
    found = steps.steps('', (), one.solution, example)
    lines = len(one.steps) + 1
    assert found[:3] == (1.0, {'steps': lines, 'right_steps': 1.0}, 'right')
    ends = [end for end, _ in found.step_rewards]
    assert [one.solution[:end].count('\n') for end in ends] == list(range(lines))
    assert all(end == len(one.solution) or one.solution[end] == '\n' for end in ends)


@pytest.mark.parametrize(
  'text, expected',
  [
    # The other order, true all along: no line of it is one of the solution's.
    ('7 - 3 = 4\n4 + 5 = 9\nThe answer is 9.', ('right', [1, 1, 1], 1)),
    # True lines of another question, whose answer is not asked for.
    ('7 - 5 = 2\n2 - 3 = -1\nThe answer is -1.', ('wrong', [0, 1, 0], 1 / 3)),
    ('7 + 3 = 10\n10 + 5 = 15\nThe answer is 15.', ('wrong', [0, 1, 0], 1 / 3)),
    # An operation is done once, and nothing is added that was not asked for.
    ('7 + 5 = 12\n12 + 5 = 17\nThe answer is 17.', ('wrong', [1, 0, 0], 1 / 3)),
    ('7 + 0 = 7\n7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.', ('right', [0, 1, 1, 1], 3 / 4)),
    # A false equation, and what goes on from it truly; the answer that follows is wrong.
    ('7 + 5 = 13\n13 - 3 = 10\nThe answer is 10.', ('wrong', [0, 1, 0], 1 / 3)),
    # A true equation out of nothing; the answer is right all the same.
    ('7 + 5 = 12\n11 - 2 = 9\nThe answer is 9.', ('right', [1, 0, 1], 2 / 3)),
    # A line of another form is a wrong step, and so is the answer that is not given.
    ('7 + 5 = 12\nso\n12 - 3 = 9', ('no_answer', [1, 0, 1, 0], 1 / 2)),
    ('7 + 5 = 12\n\n12 - 3 = 9', ('no_answer', [1, 1, 0], 2 / 3)),
    ('7 + 5 = 12\n12 - 3 = 9\nThe answe is 9.', ('no_answer', [1, 1, 0, 0], 1 / 2)),
    ('so\n7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.', ('right', [0, 1, 1, 1], 3 / 4)),
    # Nothing is earned behind an answer.
    ('The answer is 9.\n9 + 0 = 9\n9 + 0 = 9', ('right', [1], 1)),
    ('The answer is 9.\nThe answer is 9.', ('right', [1], 1)),
    ('The answer is 9. The answer is 9.\n9', ('right', [1], 1)),
    # A second answer that differs is a wrong step, and the last one is the answer.
    ('7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.\nThe answer is 3.', ('wrong', [1, 1, 1, 0], 3 / 4)),
    ('The answer is 9.\n9 + 0 = 9\nThe answer is 3.', ('wrong', [1, 0, 0], 1 / 3)),
    ('The answer is 3.\nThe answer is 9.', ('right', [0, 0], 0)),
    ('The answer is 9.\nThe answer is 3.\nThe answer is 9.', ('right', [1, 0, 0], 1 / 3)),
    ('The answer is 9. The answer is 3.', ('wrong', [0], 0)),
    ('The answer is 3. The answer is 9.', ('right', [0], 0)),
    ('The answer is 9.5', ('no_answer', [0, 0], 0)),
    ('I do not know', ('no_answer', [0, 0], 0)),
    ('', ('no_answer', [0], 0)),
    ('7 + 5 = ' + '1' * 5000, ('no_answer', [0, 0], 0)),
  ],
)
def test_steps(text, expected):
  kind, values, value = judged(text)
  assert (kind, values) == expected[:2] and value == pytest.approx(expected[2])


def test_ends_are_offsets_in_the_text_as_it_is():
  text = ' 7 + 5 = 12 \r\n\n12 - 3 = 9'
  ends = [end for end, _ in steps.steps('', (), text, EXAMPLE).step_rewards]
  assert [text[:end] for end in ends[:-1]] == [' 7 + 5 = 12', text]
  assert ends[-1] > len(text)  # the answer that did not come: at the token that ends the text


def test_an_operation_that_is_asked_twice_may_be_done_twice():
  example = {'question': 'What is 1 + 2 + 2?', 'answer': 'The answer is 5.'}
  text = '1 + 2 = 3\n3 + 2 = 5\n5 + 2 = 7\nThe answer is 5.'
  found = steps.steps('', (), text, example)
  assert [value for _, value in found.step_rewards] == [1, 1, 0, 1]


def test_giving_no_answer_never_pays():
  """However an answer's line is broken, its steps are worth less than those of a wrong answer."""
  right = '7 + 5 = 12\n12 - 3 = 9\n'
  wrong = judged(right + 'The answer is 8.')
  for line in ('', 'The answe is 8.', 'The answer is', 'The answer is 8', '9'):
    kind, values, value = judged(right + line)
    assert kind == 'no_answer' and sum(values) == sum(wrong[1])
    assert values.count(0) >= wrong[1].count(0) and value <= wrong[2]


@pytest.mark.parametrize(
  'lines', [*itertools.product(('The answer is 9.', 'The answer is 3.'), repeat=3)]
)
def test_all_readers_take_the_same_answer(lines):
  text = '\n'.join(lines)
  right = lines[-1] == 'The answer is 9.'
  assert arithmetic.is_right(text, EXAMPLE['answer']) == right
  assert (text_lib.answer('', (), text, EXAMPLE).kind == 'right') == right
  assert (judged(text)[0] == 'right') == right
  assert judged(text)[2] <= judged('The answer is 9.')[2]  # two tries are no better than one
