"""What a config amounts to before anything is built, and several configs side by side.

Totals come from the closed forms of `moe_jax.planning.flops`; the table by module comes from the
shapes of the real model (`jax.eval_shape`, nothing is allocated), and a test holds the two equal.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.balance import balance_losses as balance_losses_lib
from moe_jax.config import attention_config, moe_config, moe_rules, router_traits, schema
from moe_jax.models import model_variables
from moe_jax.planning import flops, matched_budgets, virtual_devices

NOTES = (
  'total         every parameter: both vocabulary matrices, norms and routers included.',
  '              Modules of multi-token prediction are counted apart: generation can do without.',
  'activated     the total without the routed experts that a token does not visit in training:',
  '              on average where experts choose tokens. Without the input embedding: as',
  '              DeepSeek-V2 counts.',
  'paper         training FLOPs of one sequence as DeepSeekMoE counts them: full attention, 4 D^2',
  '              attention weights, no router, FFN widths of config.paper where they are not 0.',
  '              Latent attention counts as it is, multi-token prediction not at all.',
  'exact         the same for the model as it is: causal attention, real key-value heads, router,',
  '              modules of multi-token prediction with the head once more for each.',
  '              Both count forward and backward (3 x forward), the output head, no recomputation.',
  'kv cache      what decoding keeps for each token of context; bytes in model.dtype, and at fewer',
  '              bits per number, without what the scales of a quantised cache would add.',
)
MOE_NOTES = (
  'all-to-all    bytes in model.dtype that a token sends to experts on other devices and gets',
  '              back, all MoE layers, forward pass; exact expectation for random routing',
  '              without drops; experts in contiguous blocks, one copy of a token per device.',
  'balance loss  weight x value is minimised, summed over the MoE layers; expert_level counts as',
  "              DeepSeek does (f_i = E / (K T) x load_i). The same in others' words, for equal",
  '              gradients over the same tokens when the layers are alike:',
  '              Megatron-LM    moe_aux_loss_coeff = weight (E / (K T^2), summed over layers too).',
  '              transformers   router_aux_loss_coef = weight x MoE layers / K (f_i not divided by',
  '                             K, tokens of all layers in one pool: K at balance, once).',
  '              GShard         weight of gshard = weight of switch x E^2.',
)

# Of a number in the cache: bfloat16, float8, and the mean of DeepSeek-V2 as it was deployed.
KV_CACHE_BITS = (16, 8, 6)


@dataclasses.dataclass(frozen=True)
class BalanceLoss:
  """One balance loss of a config."""

  weight: float  # 0 = only reported
  scope: str
  value_at_balance: float  # before the weight, per layer


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
  kv_cache_bytes_per_token: int  # in the compute dtype
  kv_cache_bytes_per_token_by_bits: Mapping[int, int]  # for each of KV_CACHE_BITS
  num_virtual_devices: int  # 1 for a dense model
  all_to_all_bytes_per_token: float  # expected, forward pass, all MoE layers
  router: str  # what it does and what it cannot do, for the notes; '' for a dense model
  balance_losses: Mapping[str, BalanceLoss]  # empty for a dense model
  transformers_coefficient: float | None  # see that function; None for a dense model

  def to_json(self) -> dict[str, Any]:
    """The stable keys of `describe --json`."""
    return {
      'config': self.config,
      'total_params': self.parameters.total,
      'activated_params': self.activated.total,
      'activated_params_without_embedding': self.activated.without_embedding,
      'mtp_params': self.parameters.mtp,
      'train_flops_per_sequence_paper': self.train_flops_per_sequence_paper,
      'train_flops_per_sequence': self.train_flops_per_sequence,
      'train_flops_per_token': self.train_flops_per_token,
      'kv_cache_elements_per_token': self.kv_cache_elements_per_token,
      'kv_cache_bytes_per_token': self.kv_cache_bytes_per_token,
      'kv_cache_bytes_per_token_by_bits': dict(self.kv_cache_bytes_per_token_by_bits),
      'num_virtual_devices': self.num_virtual_devices,
      'all_to_all_bytes_per_token': self.all_to_all_bytes_per_token,
      'balance_losses': {k: dataclasses.asdict(v) for k, v in self.balance_losses.items()},
      'parameters_by_module': {module.path: module.count for module in self.modules},
    }


def describe(config: schema.Config, name: str, *, with_modules: bool = True) -> Description:
  """Counts everything about `config`.

  Args:
    config: a run.
    name: what the reader knows it by.
    with_modules: False leaves `modules` empty, for which the model has to be traced.
  """
  model, itemsize = config.model, jnp.dtype(config.model.dtype).itemsize
  kv_cache = flops.kv_cache_elements_per_token(model)
  return Description(
    config=name,
    settings=_model_settings(config),
    parameters=flops.count_parameters(model),
    activated=flops.count_activated(model),
    modules=_modules(model) if with_modules else (),
    train_flops_per_sequence_paper=flops.train_flops_per_sequence_paper(model, config.paper),
    train_flops_per_sequence=flops.train_flops_per_sequence(model),
    train_flops_per_token=flops.train_flops_per_token(model),
    kv_cache_elements_per_token=kv_cache,
    kv_cache_bytes_per_token=kv_cache * itemsize,
    kv_cache_bytes_per_token_by_bits={
      bits: flops.bytes_at(kv_cache, bits) for bits in KV_CACHE_BITS
    },
    num_virtual_devices=model.moe.num_virtual_devices if model.is_moe else 1,
    all_to_all_bytes_per_token=_all_to_all_bytes(model, itemsize),
    router=router_text(model.moe) if model.is_moe else '',
    balance_losses=_balance_losses(model),
    transformers_coefficient=transformers_coefficient(model) if model.is_moe else None,
  )


def router_text(moe: moe_config.MoEConfig) -> str:
  """One line from the router's traits: what it does, experts per token, whether it can generate."""
  traits = router_traits.of(moe)
  training, outside = (traits.active_experts(moe, train) for train in (True, False))
  parts = [f'{traits.what} (arXiv {traits.paper})' if traits.paper else traits.what]
  parts.append(f'{training} of {moe.num_experts} experts per token')
  if outside != training:
    parts.append(f'{outside} outside of training')
  if not traits.causal:
    parts.append('not causal: it cannot generate text')
  return f'{moe.router}: ' + '; '.join(filter(None, parts))


def _all_to_all_bytes(model: schema.ModelConfig, itemsize: int) -> float:
  """Of all layers; 0 for a dense model, which sends nothing."""
  if not model.is_moe:
    return 0.0
  per_layer = virtual_devices.expected_bytes_per_token(model.moe, model.embed_dim, itemsize)
  return model.num_moe_layers * per_layer


def _balance_losses(model: schema.ModelConfig) -> dict[str, BalanceLoss]:
  if not model.is_moe:
    return {}
  values = {
    name: balance_losses_lib.value_at_balance(name, model.moe) for name in balance_losses_lib.LOSSES
  }
  if model.attention.num_experts:
    # Every token certain of its attention expert, and all of these as popular.
    values['attention_mutual_information'] = -math.log(model.attention.num_experts)
  losses = {name: model.moe.loss(name) for name in values}
  return {k: BalanceLoss(losses[k].weight, losses[k].scope, value) for k, value in values.items()}


def transformers_coefficient(model: schema.ModelConfig) -> float:
  """The `router_aux_loss_coef` of transformers that pulls as hard as the expert-level loss here.

  Its loss is K at balance, not 1, and is taken once over the pooled tokens of all layers, where
  ours is summed over them.
  """
  moe = model.moe
  return moe.loss('expert_level').weight * model.num_moe_layers / moe.num_experts_per_tok


def _model_settings(config: schema.Config) -> dict[str, Any]:
  """The values of `model` by dotted key, and the widths of `paper` that replace the model's own."""
  model = config.model
  values = dataclasses.asdict(model)
  moe = moe_rules.effective_settings(model.moe) if model.is_moe else {'num_experts': 0}
  values |= {'attention': attention_config.effective_settings(model.attention), 'moe': moe}
  settings = _flatten(values)
  if model.num_layers == model.num_moe_layers:
    del settings['mlp_dim']
  paper = _flatten(dataclasses.asdict(config.paper), 'paper.')
  return settings | {key: value for key, value in paper.items() if value}


def _flatten(values: trees.Json, prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    nested = isinstance(value, Mapping)
    flat |= _flatten(value, f'{prefix}{key}.') if nested else {prefix + key: value}
  return flat


def _modules(model: schema.ModelConfig) -> tuple[Parameter, ...]:
  leaves = jax.tree.leaves_with_path(model_variables.abstract_params(model))
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
    ('PER TOKEN', _per_token(descriptions)),
    ('TRAINING FLOPS', _flops(descriptions)),
    ('BALANCE LOSSES, weight x value at perfect balance', _losses(descriptions)),
    ('PARAMETERS BY MODULE', _parameters(descriptions)),
  ):
    if values:
      rows += [[], [title], *(_row(label, *cells) for label, cells in values.items())]
  header = [f'{label}  {d.config}' for label, d in zip(labels, descriptions)]
  text = [*header, '', *_align(rows), '']
  if len(descriptions) > 1:
    text += [
      'MATCHED with A',
      *matched_budgets.lines(labels, [costs(d) for d in descriptions]),
      '',
    ]
    caches = [d.kv_cache_bytes_per_token_by_bits for d in descriptions]
    text += [
      f'KV CACHE per token, vs A at {KV_CACHE_BITS[0]} bits',
      *matched_budgets.cache_lines(labels, caches),
      '',
    ]
  notes = NOTES + MOE_NOTES if any(d.balance_losses for d in descriptions) else NOTES
  routers = dict.fromkeys(d.router for d in descriptions if d.router)
  return '\n'.join([*text, *notes, *(_note('router', line) for line in routers)])


def _note(title: str, text: str) -> str:
  """A note in the columns of `NOTES`."""
  return textwrap.fill(text, 92, initial_indent=title.ljust(14), subsequent_indent=' ' * 14)


def costs(d: Description) -> dict[str, float]:
  """What a fair comparison holds equal."""
  return {
    'total parameters': d.parameters.total,
    'activated parameters': d.activated.total,
    'training FLOPs per token': d.train_flops_per_token,
    'all-to-all bytes per token': d.all_to_all_bytes_per_token,
    'kv cache bytes per token': d.kv_cache_bytes_per_token,
  }


# A row's values, one per config and None where a config has none, and how to print one of them.
_Cells = tuple[Sequence[Any], Callable[[Any], str]]


def _settings(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  def cell(value):
    return f'{value:.7g}' if isinstance(value, float) else str(value)

  keys = dict.fromkeys(key for d in descriptions for key in d.settings)
  return {key: ([d.settings.get(key) for d in descriptions], cell) for key in keys}


def _counts(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  rows = {
    'total parameters': [d.parameters.total for d in descriptions],
    'activated parameters': [d.activated.total for d in descriptions],
    '  without the input embedding': [d.activated.without_embedding for d in descriptions],
  }
  for field in dataclasses.fields(flops.ParameterCount):
    label = '  ' + field.name.replace('_', ' ')
    rows[label] = [getattr(d.parameters, field.name) for d in descriptions]
    if field.name == 'routed_experts':
      rows[label + ', activated'] = [d.activated.routed_experts for d in descriptions]
  modules = rows.pop('  mtp')
  if any(modules):
    rows['multi-token prediction, not in the total'] = modules
  return {label: (values, '{:,}'.format) for label, values in rows.items()}


def _per_token(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  devices = [str(d.num_virtual_devices) for d in descriptions]
  on = devices[0] if len(set(devices)) == 1 else ' / '.join(devices)
  rows = {
    'kv cache numbers per token': [d.kv_cache_elements_per_token for d in descriptions],
    'kv cache bytes per token': [d.kv_cache_bytes_per_token for d in descriptions],
    **{
      f'  at {bits} bits': [d.kv_cache_bytes_per_token_by_bits[bits] for d in descriptions]
      for bits in KV_CACHE_BITS
    },
    f'all-to-all bytes per token, {on} virtual device(s)': [
      d.all_to_all_bytes_per_token for d in descriptions
    ],
  }
  return {label: (values, '{:,.0f}'.format) for label, values in rows.items()}


def _flops(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  rows = {
    'per sequence, paper': [d.train_flops_per_sequence_paper for d in descriptions],
    'per sequence, exact': [d.train_flops_per_sequence for d in descriptions],
    'per token, exact': [d.train_flops_per_token for d in descriptions],
  }
  # One unit per row, so that its figures can be compared at a glance.
  return {label: (values, _in_unit_of(max(values))) for label, values in rows.items()}


def _losses(descriptions: Sequence[Description]) -> dict[str, _Cells]:
  """A row per loss that any of the models has; empty if all are dense."""

  def cell(pair):
    return f'{pair[0]:g} x {pair[1]:.5g}'

  names = dict.fromkeys(name for d in descriptions for name in d.balance_losses)

  def pair(loss):
    return loss and (loss.weight, loss.value_at_balance)

  rows: dict[str, _Cells] = {
    name: ([pair(d.balance_losses.get(name)) for d in descriptions], cell) for name in names
  }
  if names:
    coefficients = [d.transformers_coefficient for d in descriptions]
    rows['expert_level as router_aux_loss_coef'] = coefficients, lambda c: f'{c:.6g}'
  return rows


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


def _row(label: str, values: Sequence[Any], cell: Callable[[Any], str]) -> list[str]:
  cells = ['-' if value is None else cell(value) for value in values]
  return [label, *_interleave(cells, [_against(values[0], value) for value in values[1:]])]


def _against(first: Any, value: Any) -> str:
  """How `value` differs from the first config's."""
  if value == first:
    return '='
  numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (first, value))
  if not numbers or not first or not value:
    return 'differs'
  return matched_budgets.percent(first, value)


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
