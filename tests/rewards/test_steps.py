import pytest

from moe_jax.data.tasks import arithmetic
from moe_jax.rewards import steps

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
    # A detour, true all along: no line of it is one of the solution's.
    ('7 - 3 = 4\n4 + 5 = 9\nThe answer is 9.', ('right', [1, 1, 1], 1)),
    # A false equation, and what goes on from it truly; the answer that follows is wrong.
    ('7 + 5 = 13\n13 - 3 = 10\nThe answer is 10.', ('wrong', [0, 1, 0], 1 / 3)),
    # A true equation out of nothing; the answer is right all the same.
    ('7 + 5 = 12\n11 - 2 = 9\nThe answer is 9.', ('right', [1, 0, 1], 2 / 3)),
    ('7 + 5 = 12\nso\n12 - 3 = 9', ('no_answer', [1, 1], 1)),
    # Nothing is earned behind an answer.
    ('The answer is 9.\n9 + 0 = 9\n9 + 0 = 9', ('right', [1], 1)),
    ('I do not know', ('no_answer', [], 0)),
    ('', ('no_answer', [], 0)),
    ('7 + 5 = ' + '1' * 5000, ('no_answer', [], 0)),
  ],
)
def test_steps(text, expected):
  kind, values, value = judged(text)
  assert (kind, values) == expected[:2] and value == pytest.approx(expected[2])


def test_ends_are_offsets_in_the_text_as_it_is():
  text = ' 7 + 5 = 12 \r\n\n12 - 3 = 9'
  ends = [end for end, _ in steps.steps('', (), text, EXAMPLE).step_rewards]
  assert [text[:end] for end in ends] == [' 7 + 5 = 12', text]
