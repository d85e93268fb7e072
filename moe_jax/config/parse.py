"""Config values from nested dicts and back: types are checked, unknown keys refused by name."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from moe_jax import errors
from moe_jax.config import mesh_config, rules, schema

# Fields that came after runs were recorded without them: section -> field -> what held until then.
ADDED: dict[str, dict[str, Any]] = {
  'model': {'tie_embeddings': False},
  'train': {'max_skipped_steps': 0, 'stall_seconds': 0.0},
  'optim': {'spike_sigma': 0.0, 'spike_window': 128},
  'mesh': {'stage': 1, 'stage_micro_batches': 0},
  'data': {'skip_null_text': False, 'chat_format': 'deepseek_llm', 'chat_template': ''},
  'objective': {
    'kind': 'next_token',
    'inherit': False,
    'balance': True,
    'dpo': {
      'beta': 0.1,
      'loss': 'sigmoid',
      'label_smoothing': 0.0,
      'length_normalised': False,
      'sft_weight': 0.0,
    },
    'policy': {
      'algorithm': 'grpo',
      'reward': 'answer',
      'reward_model': '',
      'prompts': 32,
      'group_size': 8,
      'updates': 1,
      'max_new_tokens': 64,
      'temperature': 1.0,
      'rows': 0,
      'supervision': 'outcome',
      'std': 'sample',
      'aggregation': 'sequence_mean',
      'ratio': 'token',
      'clip_low': 0.2,
      'clip_high': 0.2,
      'dual_clip': 0.0,
      'kl': 'k3',
      'kl_weight': 0.04,
      'reference_every': 0,
      'truncated': 'keep',
      'max_draws': 1,
      'replay': 'rollout',
      'reward_seconds': 5.0,
      'eval_questions': 128,
      'ppo': {
        'gamma': 1.0,
        'gae_lambda': 0.95,
        'value_weight': 0.1,
        'value_clip': 0.2,
        'value_rate': 10.0,
        'value_warmup': 0,
        'center_steps': True,
      },
    },
    'process_reward': {
      'labels': '',
      'target': 'hard',
      'outcome': False,
      'step_token': '<｜fim▁end｜>',
      'good': '+',
      'bad': '-',
    },
  },
  'trainable': {
    'kind': 'all',
    'expert_config': '',
    'experts': (),
    'shared_experts': False,
    'non_expert_modules': False,
    'lora_rank': 8,
    'lora_alpha': 16.0,
  },
}
# Of them, the sections that are new as a whole.
_NEW_SECTIONS = ('objective', 'trainable')
LARGEST = 10**12  # no number of a run, whole or not, is as large


def from_dict(values: Mapping[str, Any]) -> schema.Config:
  """Builds and checks a `Config` from nested dicts (a ConfigDict's `to_dict()`, or parsed JSON).

  Raises:
    errors.InputError: an unknown, missing or mistyped key, or a value that breaks a rule.
  """
  config = _build(schema.Config, values, '')
  rules.validate(config)
  return config


def from_record(values: Mapping[str, Any]) -> schema.Config:
  """`from_dict` of a config that was written by this version or an older one, see `completed`."""
  return from_dict(completed(values))


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
  """A recorded config with the fields that it was too old to have, `ADDED`, and none it ignored."""
  new = {
    name: _filled(fields, values.get(name, {}))
    for name, fields in ADDED.items()
    if isinstance(values.get(name), Mapping) or name in _NEW_SECTIONS and name not in values
  }
  if new.get('data', {}).get('source') == 'mixture':
    new['data']['path'] = ''  # never read, and refused now
  return {**values, **new}


def _filled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """`given` with what is missing of `defaults`, in sections of sections too."""
  inner = {
    key: _filled(value, given[key])
    for key, value in defaults.items()
    if isinstance(value, Mapping) and isinstance(given.get(key), Mapping)
  }
  return {**defaults, **given, **inner}


def to_dict(config: schema.Config) -> dict[str, Any]:
  """The inverse of `from_dict`: nested plain dicts that JSON can hold."""
  return dataclasses.asdict(config)


def mesh_values(text: str) -> dict[str, int]:
  """'fsdp=64,expert=8' -> the values of config.mesh; axes that are not named are 1.

  Raises:
    errors.InputError: an axis is unknown, or a size is no number.
  """
  values = dict.fromkeys(mesh_config.AXES, 1)
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    known = axis in values and size.lstrip('-').isdigit()
    errors.require(
      known,
      f'--mesh={text!r}: {part!r} must be axis=size with an axis of '
      f'{", ".join(mesh_config.AXES)}{errors.did_you_mean(axis, values)}',
    )
    values[axis] = int(size)
  return values


def diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[str]:
  """Lines `key: old -> new` for every leaf in which two nested dicts differ."""
  lines = []
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key, '<absent>'), new.get(key, '<absent>')
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += diff(a, b, f'{prefix}{key}.')
    elif a != b:
      lines.append(f'{prefix}{key}: {a!r} -> {b!r}')
  return lines


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, Mapping):
    raise errors.InputError(
      f'config.{prefix[:-1]}={values!r} must be a section of {cls.__name__} fields'
    )
  fields = {f.name: f.type for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise errors.InputError(
        f'config.{prefix}{key} is not a known key{errors.did_you_mean(key, fields)}'
      )
  missing = [name for name in fields if name not in values]
  if missing:
    raise errors.InputError(
      f'config.{prefix}{missing[0]} is missing; start the config page from configs/base.py, which '
      f'has every key'
    )
  return cls(
    **{name: _coerce(kind, values[name], f'{prefix}{name}') for name, kind in fields.items()}
  )


def _coerce(kind: Any, value: Any, name: str) -> Any:
  """Checks one value against its field's type; ints become floats and lists become tuples."""
  if isinstance(kind, type) and dataclasses.is_dataclass(kind):
    return _build(kind, value, name + '.')
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple and isinstance(value, (list, tuple)):
    inner = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(inner) == len(value):
      return tuple(_coerce(k, v, f'{name}[{i}]') for i, (k, v) in enumerate(zip(inner, value)))
  elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
    return {key: _coerce(args[1], value[key], f'{name}.{key}') for key in value}
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    _check_size(value, name)
    return float(value)
  elif isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and type(value) is kind:
    if kind is int:
      _check_size(value, name)
    return value
  expected = getattr(kind, '__name__', None) if origin is None else str(kind)
  raise errors.InputError(
    f'config.{name}={value!r} must be of type {expected}, not {type(value).__name__}'
  )


def _check_size(value: float, name: str):
  """Refuses infinity, NaN and numbers that no run can mean."""
  errors.require(
    abs(value) <= LARGEST,  # not so for NaN either
    f'config.{name}={value!r} must be a finite number between -{LARGEST:.0e} and {LARGEST:.0e}; '
    'correct it',
  )
