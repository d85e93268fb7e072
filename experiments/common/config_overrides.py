"""`--config=PAGE` and `--config.KEY=VALUE` on a command line, in any order."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs import routing
from moe_jax import errors
from moe_jax.config import pages
from moe_jax.post_training import expert_config, inherited_model

_ARGUMENT = re.compile(r'--?(no)?config(?:\.([^=]+))?(?:=(.*))?', re.DOTALL)


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
  """Sorts a command line by what its arguments say of `--config`, in whatever order they stand.

  Args:
    argv: with the program's name in front.

  Returns:
    (specs of pages, overrides `--config.KEY=VALUE`, all other arguments). A value that stands in an
    argument of its own belongs to the override before it, unless that is a switch of the first
    page.
  """
  specs = [match[3] for match in _matches(argv, lambda key: False) if _is_spec(match)]
  values = pages.values(specs[0]).to_dict() if specs else {}
  others, overrides = [argv[0]], []
  for match in _matches(argv, lambda key: isinstance(_lookup(values, key), bool), others):
    if not _is_spec(match):
      overrides.append(match.string)
  return specs, overrides, others


def _matches(
  argv: Sequence[str], is_switch: Callable[[str], bool], others: list[str] | None = None
) -> Iterator[re.Match[str]]:
  """Yields matches of [no]config, KEY and VALUE in one string; adds what is no match to others."""
  others = [] if others is None else others
  words = iter(argv[1:])
  for word in words:
    match = _ARGUMENT.fullmatch(word)
    if word == '--':
      others += [word, *words]
    elif match is None:
      others.append(word)
    elif match[3] is None and not match[1] and not is_switch(match[2] or ''):
      yield _ARGUMENT.fullmatch(f'{word}={next(words, "")}')
    else:
      yield match


def _is_spec(match: re.Match[str]) -> bool:
  return not match[1] and match[2] is None


def _lookup(values: object, key: str) -> object:
  for part in key.split('.'):
    values = values.get(part) if isinstance(values, Mapping) else None
  return values


def read(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """Returns the values of a page under overrides, locked; not yet checked against the rules.

  Args:
    spec: PAGE or PAGE:VARIANT.
    overrides: `--config.KEY=VALUE`, as `split` returns them.

  Raises:
    errors.InputError: there is no such page, it has no such key, or a value is of another type.
  """
  values = pages.values(spec)
  known = values.to_dict()
  for argument in overrides:
    _check_key(known, _ARGUMENT.fullmatch(argument)[2])
  values = _overridden(values, overrides)
  given = values.to_dict()
  if _lookup(given, 'objective.inherit') and given.get('init_from'):
    # The page again, with the model of the run that it now names, under the same overrides.
    chosen = {key: given[key] for key in ('init_from', 'objective')}
    inherited = inherited_model.applied(known | chosen)
    values = _overridden(ml_collections.ConfigDict(inherited), overrides)
  inherited_model.check_template(given, values.to_dict())
  if _lookup(given, 'trainable.expert_config'):
    values = _overridden(ml_collections.ConfigDict(expert_config.applied(values.to_dict())), ())
  return values


def _overridden(
  values: ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
  """The values with `--config.KEY=VALUE` applied, locked."""
  argv = ['', *overrides]
  try:
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict(
      'config', values, flag_values=parsed, sys_argv=argv, lock_config=True
    )
    parsed(argv)
  except flags.Error as error:
    raise errors.InputError(str(error)) from error
  return values


def router_hint(values: ml_collections.ConfigDict) -> str:
  """Returns where the paper's routing of that name stands, if `model.moe.router` names a variant.

  GShard is no router of its own, for example, but a page of settings of router `topk`.
  """
  name = values.model.moe.router
  found = name in routing.SUMMARY
  return f'; --config=routing:{name} is the page of {name}, with all its settings' if found else ''


def _check_key(values: Mapping[str, object], key: str):
  prefix = 'config'
  for part in key.split('.'):
    name, bracket, index = part.partition('[')  # config_flags would set entries of lists
    if not isinstance(values, Mapping):
      raise errors.InputError(f'{prefix} is a single value, it has no key {name!r}')
    if name not in values:
      hint = errors.did_you_mean(name, values)
      raise errors.InputError(f'{prefix}.{name} is not a known key{hint}')
    values, prefix = values[name], f'{prefix}.{name}'
    errors.require(
      not bracket,
      f'{prefix}[{index} cannot be set by itself; give the whole value, --{prefix}=...',
    )
