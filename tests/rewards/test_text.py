import pytest

from moe_jax import errors
from moe_jax.rewards import text

SUM = '7 + 5 = 12\nThe answer is 12.'


def kind(function, given, gold, ids=()):
  found = function('', ids, given, {'answer': gold})
  return found.value, found.kind


@pytest.mark.parametrize(
  'gold, given, expected',
  [
    (SUM, 'The answer is 12.0.', (1.0, 'right')),
    (SUM, 'The answer is 13. The answer is 12.', (1.0, 'right')),  # the last one counts
    (SUM, 'The answer is 12. The answer is 13.', (0.0, 'wrong')),
    (SUM, '7 + 5 = 12', (0.0, 'no_answer')),  # the form is the solution's
    ('1/2', r'so it is \boxed{0.5}', (1.0, 'right')),
    ('1/2', 'so it is 50%', (1.0, 'right')),
    ('1/2', 'a half', (0.0, 'no_answer')),
    ('0.1', '0.10000000000000000001', (0.0, 'wrong')),  # equal as floats
    (r'\boxed{x+1}', r'hence \boxed{x+1}', (1.0, 'right')),
    (r'\boxed{x+1}', 'x+1', (0.0, 'no_answer')),
    ('{"a": 1}', ' {"a": 1}\n', (1.0, 'right')),
    ('{"a": 1}', '1', (0.0, 'wrong')),
    ('{"a": 1}', ' ', (0.0, 'no_answer')),
    ('5', 'The answer is ' + '5' * 10_000, (0.0, 'wrong')),
    # The beginning of a number is not the number.
    ('The answer is 2.', 'The answer is 2.5kg', (0.0, 'no_answer')),
    ('The answer is 1.', 'The answer is 1.5e3', (0.0, 'no_answer')),
    ('The answer is 1.', 'The answer is 1,200km', (0.0, 'no_answer')),
    ('The answer is 5.', 'The answer is 5 / 7kg', (0.0, 'no_answer')),
    ('The answer is 50.', r'The answer is 50\%.', (0.0, 'wrong')),
    ('#### 3', '#### 3.14rad', (0.0, 'no_answer')),
    ('2', 'so it weighs 2.5kg', (0.0, 'no_answer')),
    ('2', r'so it is \frac{1}{2}', (0.0, 'wrong')),
    ('-2', r'\boxed{-2.5kg}', (0.0, 'wrong')),
    ('2.5', r'\boxed{2.5}', (1.0, 'right')),
  ],
)
def test_answers(gold, given, expected):
  assert kind(text.answer, given, gold) == expected


@pytest.mark.parametrize(
  'given, good',
  [
    (SUM, True),
    ('The answer is 12. ', True),
    ('The answer is 12, I think', False),
    ('The answer is 1. The answer is 12.', False),
    ('12', False),
  ],
)
def test_form(given, good):
  assert kind(text.has_form(), given, SUM)[0] == good


@pytest.mark.parametrize(
  'gold, given, good',
  [
    (r'\boxed{\frac{1}{2}}', r'hence $\boxed{\frac{1}{2}}$.', True),
    (r'\boxed{1}', r'so \boxed{\sqrt{3}}', True),
    (r'\boxed{1}', r'so \boxed{\{1, 2\}} $', True),
    (r'\boxed{1}', r'so \boxed{5}.', True),
    (r'\boxed{1}', r'so \boxed{5} = 5', False),  # ends with what the box holds, not with the box
    (r'\boxed{1}', r'so \boxed{\frac{1}{2}} m', False),
    (r'\boxed{1}', r'so \boxed{\frac{1}{2}', False),
    (SUM, 'The answer is 1, of 1', False),
    (SUM, 'The answer is $12$.', True),
  ],
)
def test_the_form_is_that_of_the_last_answer_itself(gold, given, good):
  assert kind(text.has_form(), given, gold)[0] == good


def test_a_form_of_ones_own():
  function = text.has_form(r'<think>.*</think>\d+')
  assert kind(function, '<think>a\nb</think>7', '7') == (1.0, 'right')
  assert kind(function, '<think>a\nb</think>7.', '7') == (0.0, 'wrong')
  with pytest.raises(errors.InputError, match='must be a regular expression'):
    text.has_form('(')


@pytest.mark.parametrize('tokens, value', [(6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (99, -1)])
def test_length(tokens, value):
  found = text.length(limit=10, margin=4)('', [0] * tokens, '', {})
  assert found.value == value and found.parts == {'tokens': tokens}


def test_a_margin_lies_inside_of_the_limit():
  with pytest.raises(errors.InputError, match='0 < margin <= limit'):
    text.length(limit=4, margin=5)
