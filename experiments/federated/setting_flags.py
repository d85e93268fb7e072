"""Flags of the settings of federated runs; imports no JAX."""

import dataclasses
from collections.abc import Collection, Sequence

from absl import flags

from moe_jax import errors
from moe_jax.federated import methods, settings

_CHOICES = {'method': tuple(methods.METHODS), 'dataset': tuple(methods.DATASETS)}
OF_STUDY = ('method', 'imbalance', 'alpha')  # lists in the comparison, not flags of these names
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def define(without: Collection[str] = ()):
  """Defines a flag for every field of `settings.Settings` but those in `without`."""
  for field in dataclasses.fields(settings.Settings):
    text = field.metadata['help']
    if field.name in without:
      continue
    if field.name in _CHOICES:
      flags.DEFINE_enum(field.name, field.default, _CHOICES[field.name], text)
    else:
      _DEFINE.get(type(field.default), flags.DEFINE_string)(field.name, field.default, text)


def read(without: Collection[str] = (), **given: object) -> settings.Settings:
  """The settings of the flags, checked; those in `without` come from `given`.

  Raises:
    errors.InputError: a value breaks a rule.
  """
  names = [field.name for field in dataclasses.fields(settings.Settings)]
  values = {name: flags.FLAGS[name].value for name in names if name not in without}
  return settings.resolve(settings.Settings(**(values | given)))


def numbers(name: str, words: Sequence[str]) -> list[float]:
  """The values of a list flag as numbers.

  Raises:
    errors.InputError: a word is no number, or there is none.
  """
  try:
    found = [float(word) for word in words]
  except ValueError as e:
    raise errors.InputError(f'--{name}={",".join(words)} must be numbers, as in 10,100') from e
  errors.require(bool(found), f'--{name} must have a value')
  return found
