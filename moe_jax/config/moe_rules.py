"""The rules between the fields of `model.moe`, and which of them have an effect."""

import dataclasses
import math
from collections.abc import Mapping

from moe_jax import errors
from moe_jax.config import moe_config, router_traits

MoEConfig = moe_config.MoEConfig

# Losses that do not answer to dropped tokens: of the logits' size, and of attention's experts.
_NOT_OF_LOAD = ('router_z', 'attention_mutual_information')


def validate(moe: MoEConfig):
  """The rules inside `model.moe`; called for models that have experts.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """

  def at_least(minimum, *names):
    return errors.at_least(moe, 'model.moe', minimum, *names)

  at_least(1, 'num_experts_per_tok', 'moe_mlp_dim', 'num_expert_groups', 'num_virtual_devices')
  at_least(0, 'num_shared_experts', 'num_limited_groups')
  traits = router_traits.of(moe)
  errors.choice('model.moe.score_func', moe.score_func, moe_config.SCORE_FUNCS)
  errors.choice('model.moe.group_score', moe.group_score, moe_config.GROUP_SCORES)
  errors.choice('model.moe.dispatch', moe.dispatch, moe_config.DISPATCHES)
  errors.choice('model.moe.grouped_matmul', moe.grouped_matmul, moe_config.GROUPED_MATMULS)
  k, e = moe.num_experts_per_tok, moe.num_experts
  errors.require(
    k <= e,
    f'config.model.moe.num_experts_per_tok={k} must not exceed model.moe.num_experts={e}; '
    f'choose at most {e}, or more experts',
  )
  errors.require(
    moe.routed_scaling_factor > 0,
    f'config.model.moe.routed_scaling_factor={moe.routed_scaling_factor} must be positive; 1.0 '
    'leaves the gates as they are',
  )
  errors.choice('model.moe.exchange.kind', moe.exchange.kind, moe_config.EXCHANGES)
  factor = moe.exchange.buffer_factor
  errors.require(
    factor == 0 or factor >= 1,
    f'config.model.moe.exchange.buffer_factor={factor} must be at least 1, what balanced experts '
    'fill, or 0 for the worst case',
  )
  _validate_groups(moe)
  _validate_options(moe)
  _validate_bias(moe)
  _validate_balance(moe)
  _validate_capacity(moe)
  if traits.check:
    traits.check(moe)


def _validate_groups(moe: MoEConfig):
  e, m = moe.num_experts, moe.num_limited_groups
  for name in ('num_expert_groups', 'num_virtual_devices'):
    groups = getattr(moe, name)
    errors.require(
      moe_config.group_size(e, groups) * (groups - 1) < e,
      f'config.model.moe.{name}={groups} leaves a group without an expert: {e} experts are cut '
      f'into blocks of {moe_config.group_size(e, groups)}; choose a divisor of {e}',
    )
  groups = moe.num_expert_groups
  if groups == 1:
    return
  errors.require(
    1 <= m <= groups,
    f'config.model.moe.num_limited_groups={m} must lie between 1 and '
    f'model.moe.num_expert_groups={groups}',
  )
  smallest = m * moe_config.group_size(e, groups) - (moe_config.group_size(e, groups) * groups - e)
  errors.require(
    moe.num_experts_per_tok <= smallest,
    f'config.model.moe.num_limited_groups={m} leaves a token as few as {smallest} experts, fewer '
    f'than model.moe.num_experts_per_tok={moe.num_experts_per_tok}; allow more groups',
  )
  errors.require(
    router_traits.of(moe).trains_by_selection,
    f'config.model.moe.num_expert_groups={groups} limits router {_by_selection()} only, not '
    f'{moe.router!r}; set it to 1',
  )


def _validate_options(moe: MoEConfig):
  options, prefix = moe.options, 'config.model.moe.options'
  errors.at_least(
    options, 'model.moe.options', 0, 'logit_norm_scale', 'chunk_tokens', 'inference_threshold'
  )
  errors.at_least(options, 'model.moe.options', 0, 'replay_rows')
  errors.choice('model.moe.options.hash_table', options.hash_table, moe_config.HASH_TABLES)
  errors.choice('model.moe.options.inference', options.inference, moe_config.INFERENCE_RULES)
  errors.require(
    0 <= options.input_jitter < 1,
    f'{prefix}.input_jitter={options.input_jitter} must lie in [0, 1); 0 switches it off',
  )
  errors.require(0 <= options.skew <= 1, f'{prefix}.skew={options.skew} must lie between 0 and 1')
  errors.require(
    not options.random_second_expert or moe.num_experts_per_tok == 2,
    f'{prefix}.random_second_expert=True is a rule for two experts per token (GShard), not '
    f'model.moe.num_experts_per_tok={moe.num_experts_per_tok}; set it to False, or K to 2',
  )
  traits = router_traits.of(moe)
  errors.require(
    not options.random_second_expert or (traits.ranked and traits.active_experts(moe, True) == 2),
    f'{prefix}.random_second_expert=True needs two choices per token, the best first, which router '
    f'{moe.router!r} does not make; set it to False',
  )


def _by_selection() -> str:
  """The routers that an expert bias and limited groups have an effect on."""
  return ' and '.join(router_traits.names_with('trains_by_selection'))


def _validate_bias(moe: MoEConfig):
  bias, prefix = moe.expert_bias, 'config.model.moe.expert_bias'
  errors.choice('model.moe.expert_bias.update_rule', bias.update_rule, moe_config.BIAS_RULES)
  errors.choice('model.moe.expert_bias.form', bias.form, moe_config.BIAS_FORMS)
  errors.at_least(bias, 'model.moe.expert_bias', 0, 'update_rate')
  errors.require(
    0 <= bias.update_until <= 1,
    f'{prefix}.update_until={bias.update_until} must be a share of the run between 0 and 1',
  )
  errors.require(
    bias.update_rule == 'none' or router_traits.of(moe).trains_by_selection,
    f'{prefix}.update_rule={bias.update_rule!r} shifts the selection of router {_by_selection()} '
    f"only, not {moe.router!r}; set it to 'none'",
  )


def _validate_balance(moe: MoEConfig):
  balance = moe.balance
  for name in moe_config.LOSSES:
    loss = getattr(balance, name)
    errors.at_least(loss, f'model.moe.balance.{name}', 0, 'weight')
    errors.choice(f'model.moe.balance.{name}.scope', loss.scope, moe_config.LOSS_SCOPES)
  adaptive = balance.adaptive
  prefix = 'model.moe.balance.adaptive'
  for name in ('device_level', 'communication'):
    errors.require(
      not getattr(balance, name).weight or moe.num_virtual_devices > 1,
      f'config.model.moe.balance.{name}.weight={getattr(balance, name).weight} balances virtual '
      'devices, and model.moe.num_virtual_devices=1; set the weight to 0, or choose more devices',
    )
    errors.require(
      adaptive.loss != name or moe.num_virtual_devices > 1,
      f'config.{prefix}.loss={name!r} balances virtual devices, and model.moe.num_virtual_devices='
      '1; choose another loss, or more devices',
    )
  of_load = [name for name in moe_config.LOSSES if name not in _NOT_OF_LOAD]
  errors.choice(f'{prefix}.loss', adaptive.loss, ('', *of_load))
  errors.at_least(adaptive, prefix, 0, 'slope', 'max_coefficient', 'capacity_factor')
  errors.require(
    0 <= adaptive.decay < 1, f'config.{prefix}.decay={adaptive.decay} must lie in [0, 1)'
  )


def _validate_capacity(moe: MoEConfig):
  capacity, prefix = moe.capacity, 'model.moe.capacity'
  errors.choice(f'{prefix}.policy', capacity.policy, moe_config.DROP_POLICIES)
  errors.at_least(capacity, prefix, 0, 'group_rows')
  errors.require(
    0 < capacity.factor < math.inf,
    f'config.{prefix}.factor={capacity.factor} must be positive and finite; 1.0 is average',
  )
  errors.require(
    0 <= capacity.exempt_fraction <= 1,
    f'config.{prefix}.exempt_fraction={capacity.exempt_fraction} must lie between 0 and 1',
  )
  errors.require(
    moe.grouped_matmul not in moe_config.LOW_PRECISION or moe.dispatch == 'dropless',
    f'config.model.moe.grouped_matmul={moe.grouped_matmul!r} rounds the products of dispatch '
    f"'dropless' only, not of {moe.dispatch!r}; set it to 'auto', or change the dispatch",
  )
  per_expert = capacity.policy in ('position', 'score', 'batch_priority')
  bounded = router_traits.of(moe).bound is not None
  errors.require(
    moe.dispatch != 'capacity' or per_expert or bounded,
    f"config.model.moe.dispatch='capacity' has buffers of a fixed size per expert, which "
    f'{prefix}.policy={capacity.policy!r} does not bound; choose policy position, score or '
    "batch_priority, or dispatch='dropless'",
  )
  errors.require(
    not (moe.dispatch == 'capacity' and capacity.exempt_fraction),
    f'config.{prefix}.exempt_fraction={capacity.exempt_fraction} lets rows exceed the buffers of '
    "model.moe.dispatch='capacity'; set it to 0, or use dispatch='dropless'",
  )
  errors.require(
    not bounded or capacity.policy == 'none',
    f'config.{prefix}.policy={capacity.policy!r} has nothing to drop with router {moe.router!r}, '
    "which bounds itself what an expert takes; set it to 'none'",
  )


def effective_settings(moe: MoEConfig) -> Mapping[str, object]:
  """Flat settings of `moe` without the options of routers, losses and policies that are off."""
  values = {field.name: getattr(moe, field.name) for field in dataclasses.fields(moe)}
  flat = {k: value for k, value in values.items() if not dataclasses.is_dataclass(value)}
  if moe.num_expert_groups == 1:
    del flat['num_limited_groups'], flat['group_score']
  own = router_traits.of(moe).options
  owned = {option for traits in router_traits.known().values() for option in traits.options}
  for name, value in dataclasses.asdict(moe.options).items():
    if value and (name in own or name not in owned):
      flat[f'options.{name}'] = value
  if moe.expert_bias.update_rule != 'none':
    flat |= {f'expert_bias.{k}': v for k, v in dataclasses.asdict(moe.expert_bias).items()}
  for name in moe_config.LOSSES:
    loss = moe.loss(name)
    if loss.weight:
      flat |= {f'balance.{name}.weight': loss.weight, f'balance.{name}.scope': loss.scope}
  if moe.balance.adaptive.loss:
    flat |= {
      f'balance.adaptive.{k}': v for k, v in dataclasses.asdict(moe.balance.adaptive).items()
    }
  if moe.capacity.policy != 'none':
    flat |= {f'capacity.{k}': v for k, v in dataclasses.asdict(moe.capacity).items()}
  return flat
