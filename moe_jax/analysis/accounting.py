"""What a config amounts to before anything is built, and several configs side by side.

Totals come from the closed forms of `moe_jax.flops`; the table by module comes from the shapes of
the real model (`jax.eval_shape`, nothing is allocated), and a test holds the two equal.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moe_jax import config as config_lib
from moe_jax import flops
from moe_jax.models import transformer

NOTES = (
  'total         every parameter: both vocabulary matrices, norms and routers included.',
  'activated     the total without the routed experts that a token does not visit.',
  'paper         training FLOPs of one sequence as DeepSeekMoE counts them: full attention, 4 D^2',
  '              attention weights, no router, FFN widths of config.paper where they are not 0.',
  'exact         the same for the model as it is: causal attention, real key-value heads, router.',
  '              Both count forward and backward (3 x forward), the output head, no recomputation.',
  'kv cache      numbers, not bytes, that decoding keeps for each token of context.',
)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One array of the model; arrays of layers of one kind are stacked along the first axis."""

  path: str  # for example moe_layers/attention/q
  shape: tuple[int, ...]

  @property
  def count(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Description:
  """Everything that `experiments.describe` says about one config."""

  config: str  # the name under which the config was asked for
  settings: Mapping[str, Any]  # flat values of the model section that have an effect on this model
  parameters: flops.ParameterCount
  activated: flops.ParameterCount
  modules: tuple[Parameter, ...]  # of the real model, in the order of its tree
  train_flops_per_sequence_paper: int
  train_flops_per_sequence: int
  train_flops_per_token: int
  kv_cache_elements_per_token: int

  def to_json(self) -> dict[str, Any]:
    """The stable keys of `describe --json`."""
    return {
      'config': self.config,
      'total_params': self.parameters.total,
      'activated_params': self.activated.total,
      'train_flops_per_sequence_paper': self.train_flops_per_sequence_paper,
      'train_flops_per_sequence': self.train_flops_per_sequence,
      'train_flops_per_token': self.train_flops_per_token,
      'kv_cache_elements_per_token': self.kv_cache_elements_per_token,
      'parameters_by_module': {module.path: module.count for module in self.modules},
    }


def describe(config: config_lib.Config, name: str) -> Description:
  """Counts everything about `config`; `name` is what the reader knows it by."""
  model = config.model
  return Description(
    config=name,
    settings=_model_settings(config),
    parameters=flops.count_parameters(model),
    activated=flops.count_activated(model),
    modules=_modules(model),
    train_flops_per_sequence_paper=flops.train_flops_per_sequence_paper(model, config.paper),
    train_flops_per_sequence=flops.train_flops_per_sequence(model),
    train_flops_per_token=flops.train_flops_per_token(model),
    kv_cache_elements_per_token=flops.kv_cache_elements_per_token(model),
  )


def _model_settings(config: config_lib.Config) -> dict[str, Any]:
  """The values of `model` by dotted key, and the widths of `paper` that replace the model's own."""
  model = config.model
  settings = _flatten(dataclasses.asdict(model))
  if not model.is_moe:
    settings = {
      key: value
      for key, value in settings.items()
      if not key.startswith('moe.') or key == 'moe.num_experts'
    }
  if model.num_layers == model.num_moe_layers:
    del settings['mlp_dim']
  paper = _flatten(dataclasses.asdict(config.paper), 'paper.')
  return settings | {key: value for key, value in paper.items() if value}


def _flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    nested = isinstance(value, Mapping)
    flat |= _flatten(value, f'{prefix}{key}.') if nested else {prefix + key: value}
  return flat


def _modules(model: config_lib.ModelConfig) -> tuple[Parameter, ...]:
  leaves = jax.tree.leaves_with_path(transformer.abstract_params(model))
  return tuple(Parameter('/'.join(key.key for key in path), leaf.shape) for path, leaf in leaves)


def table(descriptions: Sequence[Description]) -> str:
  """A text table with one column per config.

  Every column but the first is followed by its difference from the first: '=', a percentage, or
  'differs' where a percentage means nothing.
  """
  labels = [chr(ord('A') + i) if i < 26 else str(i) for i in range(len(descriptions))]
  rows: list[list[str]] = [['', *_interleave(labels, ['vs A'] * (len(labels) - 1))]]
  for title, values in (
    ('SETTINGS', _settings(descriptions)),
    ('COUNTS', _counts(descriptions)),
    ('TRAINING FLOPS', _flops(descriptions)),
    ('PARAMETERS BY MODULE', _parameters(descriptions)),
  ):
    rows += [[], [title], *(_row(label, *cells) for label, cells in values.items())]
  header = [f'{label}  {d.config}' for label, d in zip(labels, descriptions)]
  return '\n'.join([*header, '', *_align(rows), '', *NOTES])


# A row's values, one per config and None where a config has none, and how to print one of them.
_Cells = tuple[list[Any], Callable[[Any], str]]


def _settings(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  cell = lambda value: f'{value:.7g}' if isinstance(value, float) else str(value)
  keys = dict.fromkeys(key for d in descriptions for key in d.settings)
  return {key: ([d.settings.get(key) for d in descriptions], cell) for key in keys}


def _counts(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  rows = {
    'total parameters': [d.parameters.total for d in descriptions],
    'activated parameters': [d.activated.total for d in descriptions],
  }
  for field in dataclasses.fields(flops.ParameterCount):
    label = '  ' + field.name.replace('_', ' ')
    rows[label] = [getattr(d.parameters, field.name) for d in descriptions]
    if field.name == 'routed_experts':
      rows[label + ', activated'] = [d.activated.routed_experts for d in descriptions]
  rows['kv cache numbers per token'] = [d.kv_cache_elements_per_token for d in descriptions]
  return {label: (values, '{:,}'.format) for label, values in rows.items()}


def _flops(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  rows = {
    'per sequence, paper': [d.train_flops_per_sequence_paper for d in descriptions],
    'per sequence, exact': [d.train_flops_per_sequence for d in descriptions],
    'per token, exact': [d.train_flops_per_token for d in descriptions],
  }
  # One unit per row, so that its figures can be compared at a glance.
  return {label: (values, _in_unit_of(max(values))) for label, values in rows.items()}


def _in_unit_of(largest: float) -> Callable[[float], str]:
  scale, unit = next(
    (u for u in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')) if largest >= u[0]), (1e3, 'K')
  )
  return lambda value: f'{value / scale:,.2f} {unit}'


def _parameters(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  """A row per array that any of the models has; with its shape if there is only one model."""
  if len(descriptions) == 1:
    modules = descriptions[0].modules
    return {f'{m.path} {list(m.shape)}': ([m.count], '{:,}'.format) for m in modules}
  counts = [{module.path: module.count for module in d.modules} for d in descriptions]
  paths = dict.fromkeys(path for count in counts for path in count)
  return {path: ([count.get(path) for count in counts], '{:,}'.format) for path in paths}


def _row(label: str, values: list[Any], cell: Callable[[Any], str]) -> list[str]:
  cells = ['-' if value is None else cell(value) for value in values]
  return [label, *_interleave(cells, [_against(values[0], value) for value in values[1:]])]


def _against(first: Any, value: Any) -> str:
  """How `value` differs from the first config's."""
  if value == first:
    return '='
  numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (first, value))
  if not numbers or not first or not value:
    return 'differs'
  percent = 100 * (value / first - 1)
  return f'{percent:+,.1f} %' if abs(percent) >= 0.1 else f'{percent:+.1g} %'


def _interleave(cells: list[str], marks: list[str]) -> list[str]:
  """The first cell, then each further cell followed by its mark."""
  pairs = zip(cells[1:], marks)
  return [cells[0], *(text for pair in pairs for text in pair)]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
  """Pads the columns of all rows to one width: labels to the left, values to the right."""
  full = [row for row in rows if len(row) > 1]
  widths = [max(map(len, column)) for column in zip(*full)]
  lines = []
  for row in rows:
    cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
    lines.append('  '.join([*(label.ljust(widths[0]) for label in row[:1]), *cells]).rstrip())
  return lines
