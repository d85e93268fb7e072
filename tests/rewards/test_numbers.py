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
    ('\N{MINUS SIGN}5', Fraction(-5)),
    (r'50\%', Fraction(1, 2)),
    ('50 %', Fraction(1, 2)),
    (r'-$\frac{1}{2}$', Fraction(-1, 2)),
    ('2.5kg', None),
    ('5 / 7kg', None),
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


@pytest.mark.parametrize(
  'text',
  [
    *('5kg', '2.5kg', '2.75x', '1.5e3', '1.5E-3', '1,200km', '5 / 7kg', '3.14rad', '50%x', '0x1F'),
    *('-2.5kg', '+2.5kg', '$2.5k', '-1,200km', '-5/7kg', '1_000', "1'000", '1,2000', '1,200,00'),
    *('5.5.1', '5/7/2023', '5 / 7 / 2', '5 / x', '2:30', '1 1/2', '10 000', '10\u202f000', '1,2,3'),
    *('2^10', '2^{10}', '5\u00b2', '1\u00bd', '5\u03c0', '2\u221a3', '1.5 \u00d7 10^3', '2 * 3^2'),
    *(r'2\frac{1}{2}', r'2\sqrt{3}', r'5 \pi', r'1.5 \times 10^3', r'1{,}200', r'1\,200'),
    *(r'\frac{1}{2}x', r'\sqrt{2}', 'x^{2}', r'\frac{1}{x}', r'50\%x'),
  ],
)
def test_a_part_of_a_number_is_none(text):
  for before in ('', 'The answer is ', '#### '):
    for behind in ('', '.', ' of them'):
      for form in ('stated', 'last'):
        assert numbers.stated(before + text + behind, form) is None, (before, behind, form)


@pytest.mark.parametrize(
  'text',
  [
    *('5', '-5', '\N{MINUS SIGN}5', '2.5', '-1,200.5', '$1,200', '$-5', '5/7', '5 / 7', '-5/7'),
    *('50%', '50 %', r'50\%', r'\frac{1}{2}', r'-\frac{1}{2}', r'$-\frac{1}{2}', '.5', '007'),
  ],
)
def test_a_whole_number_is_read_whole_whatever_stands_behind_it(text):
  ends = ('', '.', '. So', ', I think', '$', '!', '\n3 of them', '\n* 3', ' kg', '...', ')')
  for behind in (*ends, r'\text{ kg}', r'^\circ'):
    for form in ('stated', 'last'):
      said = f'The answer is {text}{behind}'
      want = '3' if form == 'last' and '3' in behind else text
      assert numbers.stated(said, form) == want, (said, form)
  assert numbers.parse(text) is not None


@pytest.mark.parametrize(
  'text, solution, found',
  [
    ('7 + 5 = 12\nThe answer is 12.0. (3 steps)', 'The answer is 12.', '12'),
    ('The answer is 2/4', 'The answer is 1/2.', '1/2'),
    ('so 12', 'The answer is 12.', None),
    ('The answer is 5. (3 steps)', '5', '5'),
    (r'\boxed{5} after 2 tries', '5', '5'),
    ('it is 5', '5', '5'),
    ('five', '5', None),
    (r'\boxed{x}', '5', 'x'),
    (' Paris\n', 'Rome', 'Paris'),
    (' ', 'Rome', None),
    (r'hence \boxed{ x+1 }', r'\boxed{x}', 'x+1'),
    ('x+1', r'\boxed{x}', None),
    (r'\boxed{}', r'\boxed{x}', None),
  ],
)
def test_the_answer_that_a_text_gives(text, solution, found):
  assert numbers.answer_in(text, solution) == found


def test_no_answer_is_that_of_a_solution_without_one():
  assert numbers.is_right('so it is 3*6.\n#### 18', '#### 18')
  assert not numbers.is_right('nothing here', r'\boxed{}')
  assert numbers.answer_in('', r'\boxed{}') == numbers.answer_in(r'\boxed{}', r'\boxed{}') is None
