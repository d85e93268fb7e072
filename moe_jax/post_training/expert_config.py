"""Which experts a task trains: ESFT's selection and its files (arXiv 2407.01906, section 3).

Both files are the official ones, so those of released checkpoints are read, and their readers read
ours: `summary.json`, scores rounded to four digits by layer and expert, and `expert_cfg.json`, the
chosen experts of every MoE layer. Layers are counted with the dense ones, experts without the
shared ones.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import atomic_files, errors
from moe_jax.config import paths, schema
from moe_jax.data import json_files

KINDS = ('token', 'gate')
PAPERS_SHARE = {'token': 0.2, 'gate': 0.1}  # p
_WAY_OUT = 'write it with python -m experiments.esft'


class ExpertConfig(NamedTuple):
  """What fine-tuning changes of a model; all else is frozen."""

  experts: dict[int, list[int]]  # MoE layer -> routed experts, the most used first
  shared_experts: bool
  non_expert_modules: bool  # attention, routers, norms, embedding and head


class ExpertScores(NamedTuple):
  """Of every routed expert in every MoE layer."""

  token: np.ndarray  # [layers, E] float64
  gate: np.ndarray  # [layers, E] float64
  num_tokens: int  # that were read
  first_layer: int  # number of the first MoE layer, dense ones counted


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


def select(scores: np.ndarray, first_layer: int, share: float) -> ExpertConfig:
  """The most used experts of every layer, as few as reach `share` together.

  Args:
    scores: [layers, E] of one kind.
    first_layer: number of the first row's layer.
    share: p; 0.2 for token scores and 0.1 for gate scores in the paper.

  Raises:
    errors.InputError: p is not in (0, 1].
  """
  errors.require(
    0 < share <= 1,
    f'--p={share} must lie in (0, 1]; the paper has 0.2 for token scores and 0.1 for gate scores',
  )
  experts = {}
  for layer, row in enumerate(np.asarray(scores, np.float64), start=first_layer):
    order = np.argsort(-row, kind='stable')
    reached = np.concatenate([[0.0], np.cumsum(row[order])[:-1]])  # before each one is taken
    # An expert that no token has visited is never taken, also where the sum does not reach p.
    experts[layer] = [
      int(e) for e, sum_so_far in zip(order, reached) if sum_so_far < share and row[e]
    ]
  return ExpertConfig(experts, False, False)


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


def write_scores(path: pathlib.Path, scores: ExpertScores):
  """Writes summary.json, whole or not at all."""

  def table(values: np.ndarray) -> dict[str, Any]:
    return {
      str(layer): {str(e): round(float(value), 4) for e, value in enumerate(row)}
      for layer, row in enumerate(values, start=scores.first_layer)
    }

  content = {f'{kind}_scores': table(getattr(scores, kind)) for kind in KINDS}
  atomic_files.write_text(path, json.dumps(content) + '\n')


def read_scores(path: pathlib.Path, kind: str) -> tuple[np.ndarray, int]:
  """([layers, E] scores of one kind out of summary.json, number of the first layer).

  Raises:
    errors.InputError: the file is no table of scores.
  """
  table = json_files.read_object(path, _WAY_OUT).get(f'{kind}_scores')
  try:
    if not isinstance(table, Mapping):
      raise ValueError(f'it has no "{kind}_scores"')
    layers = sorted(int(layer) for layer in table)
    rows = [
      [float(table[str(layer)][str(e)]) for e in range(len(table[str(layer)]))] for layer in layers
    ]
    found = np.array(rows)
    if not layers or layers != list(range(layers[0], layers[0] + len(layers))) or found.ndim != 2:
      raise ValueError('its layers or experts are not all there')
    if not np.isfinite(found).all() or (found < 0).any():
      raise ValueError('a score is negative, or no number')
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise errors.InputError(f'{path} must be a table of scores ({e}); {_WAY_OUT} score') from e
  return found, layers[0]


def _range(layers: Sequence[int]) -> str:
  return f'{min(layers)} to {max(layers)}'
