import math

import pytest

from moe_jax import errors
from moe_jax.interop import hf_values

HF = {'n': 7, 'x': 0.5, 'yes': True, 'no': False, 'null': None, 'text': '7', 'list': [7]}


def test_values_of_their_type_come_back():
  assert hf_values.size(HF, 'n') == hf_values.count(HF, 'n') == 7
  assert hf_values.real(HF, 'x', 0, 1) == 0.5 and type(hf_values.real(HF, 'n', 0, 9)) is float
  assert hf_values.flag(HF, 'yes') and not hf_values.flag(HF, 'no', True)
  for absent in ('null', 'nowhere'):
    assert hf_values.count(HF, absent) == 0 and hf_values.size(HF, absent, 3) == 3
    assert hf_values.real(HF, absent, 0, 1, 0.25) == 0.25 and hf_values.flag(HF, absent, True)
    for read in (hf_values.size, hf_values.flag):
      with pytest.raises(errors.InputError, match=f'{absent} is missing'):
        read(HF, absent)


@pytest.mark.parametrize('value', [True, '7', [7], {}, 7.0, -1, 2**31, 10**40])
def test_other_sizes_are_refused_in_a_short_line(value):
  for read in (hf_values.size, hf_values.count):
    with pytest.raises(errors.InputError, match='n=.* must be a whole number') as found:
      read({'n': value}, 'n')
    assert len(str(found.value)) < 200
  with pytest.raises(errors.InputError, match='n=0 must be a whole number from 1 to 5'):
    hf_values.size({'n': 0}, 'n', most=5)


@pytest.mark.parametrize('value', [True, '0.5', [], math.nan, math.inf, -0.1, 1.1, 10**40])
def test_other_numbers_are_refused(value):
  with pytest.raises(errors.InputError, match='x=.* must be a number from 0 to 1'):
    hf_values.real({'x': value}, 'x', 0, 1)


@pytest.mark.parametrize('value', [1, 0, 'true', []])
def test_what_is_nearly_a_flag_is_refused(value):
  with pytest.raises(errors.InputError, match='yes=.* must be true or false'):
    hf_values.flag({'yes': value}, 'yes')
