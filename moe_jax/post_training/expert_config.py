"""Which experts a task trains: ESFT's file expert_cfg.json (arXiv 2407.01906, section 3).

It is the official one, so those of released checkpoints are read, and their readers read ours.
Layers are counted with the dense ones, experts without the shared ones. Config pages read it, so
nothing here takes long to import.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import atomic_files, errors
from moe_jax.config import paths, schema
from moe_jax.data import json_files

_WAY_OUT = 'write it with python -m experiments.esft select'


class ExpertConfig(NamedTuple):
  """What fine-tuning changes of a model; all else is frozen."""

  experts: dict[int, list[int]]  # MoE layer -> routed experts, the most used first
  shared_experts: bool
  non_expert_modules: bool  # attention, routers, norms, embedding and head


def applied(values: dict[str, Any]) -> dict[str, Any]:
  """Config values with the content of the file `trainable.expert_config` in the place of its path.

  A run is resumed with the experts that it was started with, wherever the file is then, and is
  refused others. Without a path the values stay as they are.

  Args:
    values: of a config page, as nested dicts, with the model that is tuned.

  Raises:
    errors.InputError: the file is no such config, or that of another model.
  """
  given = values.get('trainable', {})
  if not given.get('expert_config'):
    return values
  path = paths.local(given['expert_config'], 'config.trainable.expert_config')
  model = values['model']
  layers = range(model['num_dense_layers'], model['num_layers'])
  found = read(pathlib.Path(path), layers, model['moe']['num_experts'])
  return values | {'trainable': given | fields(found)}


def fields(config: ExpertConfig) -> dict[str, Any]:
  """What `config.trainable` holds of a config that was read."""
  experts = tuple(tuple(ids) for _, ids in sorted(config.experts.items()))
  return config._asdict() | {'experts': experts, 'expert_config': ''}


def of(trained: schema.TrainableConfig, first_layer: int) -> ExpertConfig:
  """The config that `config.trainable` was read from; `first_layer` is the first MoE layer."""
  experts = {layer: list(ids) for layer, ids in enumerate(trained.experts, start=first_layer)}
  return ExpertConfig(experts, trained.shared_experts, trained.non_expert_modules)


def count(config: ExpertConfig) -> tuple[int, int, int]:
  """Experts that are trained: in all, and the fewest and the most of a layer."""
  numbers = [len(experts) for experts in config.experts.values()]
  return sum(numbers), min(numbers), max(numbers)


def write(path: pathlib.Path, config: ExpertConfig):
  """Writes expert_cfg.json, whole or not at all."""
  experts = {str(layer): ids for layer, ids in sorted(config.experts.items())}
  atomic_files.write_text(path, json.dumps(config._asdict() | {'experts': experts}) + '\n')


def read(path: pathlib.Path, layers: Sequence[int], num_experts: int) -> ExpertConfig:
  """Reads expert_cfg.json.

  Args:
    path: of the file.
    layers: numbers of the model's MoE layers, each of which must have a key.
    num_experts: E, routed experts of a layer.

  Raises:
    errors.InputError: the file is no such config, or that of another model.
  """
  content = json_files.read_object(path, _WAY_OUT)
  found = content.get('experts')
  wanted = [str(layer) for layer in layers]
  errors.require(
    isinstance(found, Mapping) and sorted(found) == sorted(wanted),
    f'{path}: "experts" must have every MoE layer of the model, {_range(layers)}, and no other, an '
    'empty list for a layer of which nothing is trained; it is that of another model',
  )
  assert isinstance(found, Mapping)
  for layer, ids in found.items():
    errors.require(
      isinstance(ids, list)
      and all(type(e) is int and 0 <= e < num_experts for e in ids)
      and len(set(ids)) == len(ids),
      f'{path}: layer {layer} must have a list of different experts below {num_experts}, the '
      f'number of routed experts, not {str(ids)[:80]}; correct it',
    )
  switches = {name: content.get(name, False) for name in ('shared_experts', 'non_expert_modules')}
  for name, value in switches.items():
    errors.require(
      isinstance(value, bool), f'{path}: {name}={value!r} must be true or false; correct it'
    )
  return ExpertConfig({int(layer): list(ids) for layer, ids in found.items()}, **switches)


def _range(layers: Sequence[int]) -> str:
  return f'{min(layers)} to {max(layers)}'
