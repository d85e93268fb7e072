from fractions import Fraction

import pytest

from moe_jax.rewards import numbers


@pytest.mark.parametrize(
  'text, value',
  [
    ('7', Fraction(7)),
    (' -1,200.5 ', Fraction(-2401, 2)),
    ('3/4', Fraction(3, 4)),
    ('12.5%', Fraction(1, 8)),
    (r'-\dfrac{3}{4}', Fraction(-3, 4)),
    (r'$\frac{-6}{8}$', Fraction(-3, 4)),
    ('$5.', Fraction(5)),
    ('.5', Fraction(1, 2)),
    ('3/0', None),
    (r'\frac{1}{0}', None),
    ('1e9', None),  # an exponent costs as much to read as it says
    ('1,2', None),
    ('1,2000', None),
    ('٣', None),
    ('two', None),
    ('', None),
    ('9' * 65, None),
    ('__import__("os")', None),
  ],
)
def test_numbers_are_read_exactly(text, value):
  assert numbers.parse(text) == value


@pytest.mark.parametrize(
  'text, form, found',
  [
    (r'so \boxed{1} or \boxed{\frac{1}{2}}.', 'boxed', r'\frac{1}{2}'),
    (r'so \boxed{12', 'boxed', None),
    ('The answer is 3. No, the answer is: -4.', 'stated', '-4'),
    ('3 + 4 = 7\n#### 1,234', 'stated', '1,234'),
    ('the answer is four', 'stated', None),
    ('12 - 3 = 9 apples.', 'last', '9'),
    ('7-3', 'last', '3'),
    ('x2 and y3', 'last', None),
    ('', 'last', None),
  ],
)
def test_the_last_answer_of_a_form(text, form, found):
  assert numbers.stated(text, form) == found


def test_a_solution_shows_in_which_form_answers_are():
  assert numbers.form_of(r'1 + 1 = \boxed{2}, the answer is 2') == 'boxed'
  assert numbers.form_of('1 + 1 = 2\nThe answer is 2.') == 'stated'
  assert numbers.form_of('2') == 'last'


def test_answers_are_counted():
  assert numbers.times_stated(r'\boxed{1} \boxed{2}', 'boxed') == 2
  assert numbers.times_stated('The answer is 1. The answer is 2.', 'stated') == 2
  assert numbers.times_stated('no', 'stated') == 0 and numbers.times_stated('1 2', 'last') == 1
