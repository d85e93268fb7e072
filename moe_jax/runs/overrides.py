"""A trained run under other routing settings: fewer experts per token, drops at evaluation, ...

Only settings of `config.model` that leave every array of the checkpoint as it is can be changed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax import errors, trees
from moe_jax.checkpoints import integrity
from moe_jax.config import parse as parse_lib
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.runs import trained_run

_BOOLS = {'true': True, 'false': False}


def parse(cfg: schema.Config, assignments: Sequence[str]) -> dict[str, Any]:
  """Reads texts `KEY=VALUE`, each value by the type of its field.

  Args:
    cfg: whose fields they are.
    assignments: for example 'model.moe.num_experts_per_tok=3'.

  Raises:
    errors.InputError: a text without '=', an unknown or repeated key, a value of another type.
  """
  values = {}
  for text in assignments:
    key, equals, value = text.partition('=')
    errors.require(
      bool(equals),
      f'--override={text} must be KEY=VALUE, for example model.moe.num_experts_per_tok=3',
    )
    key = key.removeprefix('config.')
    errors.require(key not in values, f'--override={key} is given twice; give it once')
    values[key] = _read(key, value, _field(cfg, key))
  return values


def _field(cfg: schema.Config, key: str) -> Any:
  """The present value of a dotted key, a single number, word or truth value."""
  section, prefix = cfg, 'config'
  for name in key.split('.'):
    known = (
      [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
    )
    errors.require(
      name in known, f'{prefix}.{name} is not a known key{errors.did_you_mean(name, known)}'
    )
    section, prefix = getattr(section, name), f'{prefix}.{name}'
  errors.require(
    isinstance(section, (bool, int, float, str)),
    f'{prefix} is not a single value, so it cannot be overridden; name one of its fields, if any',
  )
  return section


def _read(key: str, text: str, old: Any) -> Any:
  """The value that `text` means for a field that holds `old`."""
  kind = type(old)
  try:
    return _BOOLS[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError):
    expected = 'true or false' if kind is bool else f'of type {kind.__name__}'
    raise errors.InputError(f'--override={key}={text} must be {expected}') from None


def changed(cfg: schema.Config, values: trees.Json) -> schema.Config:
  """`cfg` under other settings, checked; allocates nothing.

  Args:
    cfg: of a checkpoint.
    values: by dotted key.

  Raises:
    errors.InputError: a key outside of the model, a value that breaks a rule, or one under which
      the checkpoint's arrays would have to be others.
  """
  nested = parse_lib.to_dict(cfg)
  for key, value in values.items():
    _field(cfg, key)
    errors.require(
      key.startswith('model.'),
      f'config.{key} has no part in what a checkpoint computes; only keys of config.model can be '
      'overridden',
    )
    *sections, name = key.split('.')
    section = nested
    for part in sections:
      section = section[part]
    section[name] = value
  new = parse_lib.from_dict(nested)
  _check_arrays(cfg.model, new.model, values)
  return new


def _check_arrays(old: schema.ModelConfig, new: schema.ModelConfig, values: trees.Json):
  before, after = _arrays(old), _arrays(new)
  for name in [*before, *(name for name in after if name not in before)]:
    if before.get(name) != after.get(name):
      given = ', '.join(f'{key}={value}' for key, value in values.items())
      raise errors.InputError(
        f'--override={given} needs {name} {after.get(name, "absent")}, but the checkpoint has it '
        f'{before.get(name, "absent")}; only settings that keep the weights can be overridden, for '
        'others train a model'
      )


def _arrays(model: schema.ModelConfig) -> dict[str, str]:
  """{name: dtype and shape} of everything that a checkpoint keeps for the model."""
  variables = partitioning.unbox(
    jax.eval_shape(lambda: model_variables.init(model, jax.random.key(0)))
  )
  return {
    integrity.leaf_name(path): f'{leaf.dtype}{list(leaf.shape)}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  }


def apply(run: trained_run.Run, values: trees.Json) -> trained_run.Run:
  """A loaded run under other settings; see `changed`."""
  return dataclasses.replace(run, cfg=changed(run.cfg, values))
