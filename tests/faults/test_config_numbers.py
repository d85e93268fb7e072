"""No number of a configuration is infinite, NaN or absurdly large, whichever field it stands in."""

import re

import pytest

from moe_jax import errors
from moe_jax.config import parse
from tests import tiny


def leaves(section, kind, path=()):
  """Paths of the fields of one type; of tuples and mixtures, none."""
  for key, value in section.items():
    if isinstance(value, dict):
      yield from leaves(value, kind, (*path, key))
    elif type(value) is kind:
      yield (*path, key)


FLOATS = sorted(leaves(tiny.values(), float))
INTS = sorted(leaves(tiny.values(), int))


def with_value(path, value):
  values = tiny.values()
  section = values
  for name in path[:-1]:
    section = section[name]
  section[path[-1]] = value
  return values


def refusal(path, value) -> str:
  """Why the config with this value is refused; '' if it is not."""
  try:
    parse.from_dict(with_value(path, value))
  except errors.InputError as error:
    return str(error)
  return ''


def test_every_real_number_is_finite_and_bounded():
  for path in FLOATS:
    for value in (float('inf'), float('-inf'), float('nan'), 1e18):
      rule = rf'config\.{".".join(path)}=.*must be a finite'
      assert re.match(rule, line := refusal(path, value)), (path, value, line)


def test_every_whole_number_is_bounded():
  for path in INTS:
    for value in (10**20, -(10**20)):
      rule = rf'config\.{".".join(path)}=-?10+ must be a'
      assert re.match(rule, line := refusal(path, value)), (path, value, line)


def test_numbers_inside_of_tuples():
  values = with_value(('optim', 'multi_step_boundaries'), (0.5, float('nan')))
  with pytest.raises(errors.InputError, match=r'multi_step_boundaries\[1\]=nan must be a finite'):
    parse.from_dict(values)


def test_there_are_such_fields():
  assert len(FLOATS) > 20 and len(INTS) > 30
