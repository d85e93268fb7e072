"""What the tests of config share."""

import pytest

from moe_jax import errors
from moe_jax.config import parse
from tests import tiny


def part(**overrides):
  return {'source': 'text', 'path': 'a.txt', 'weight': 1.0} | overrides


def change(path: str, value):
  """The tiny values with one key set, whether or not it is known."""
  values = tiny.values()
  *sections, key = path.split('.')
  section = values
  for name in sections:
    section = section[name]
  section[key] = value
  return values


def assert_refused(overrides, parts):
  """`overrides` are refused in one message that holds all of `parts`."""
  values = tiny.values()
  for path, value in overrides.items():
    *sections, key = path.split('__')
    section = values
    for name in sections:
      section = section[name]
    section[key] = value
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(values)
  for words in parts:
    assert words in str(error.value)
  assert str(error.value).startswith('config.')
