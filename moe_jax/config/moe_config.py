"""What every field of `model.moe` means, its type, and the rules between fields.

Selection, gating, balancing, capacity and dispatch are independent choices: each has its own field
or section, and any value of one may meet any value of another unless `validate` says why not.
"""

import dataclasses
import math
from collections.abc import Mapping

from moe_jax import errors

ROUTERS = ('topk', 'hash', 'expert_choice', 'ds_moe', 'sinkhorn', 'balanced', 'skewed', 'replay')
REGISTERED: list[str] = []  # routers from outside of the library, by `models.routers.register`
SCORE_FUNCS = ('softmax', 'sigmoid')
GROUP_SCORES = ('max', 'top2_sum')
HASH_TABLES = ('random', 'balanced')
INFERENCE_RULES = ('all', 'threshold', 'topk', 'threshold_topk')
DISPATCHES = ('dense', 'dropless', 'capacity', 'gather')
LOW_PRECISION = ('int8', 'float8_e4m3fn')  # what products of experts may be rounded to
GROUPED_MATMULS = ('auto', 'blocks', 'ragged_dot', 'megablox', 'tokamax', *LOW_PRECISION)
BIAS_RULES = ('none', 'sign', 'proportional')
BIAS_FORMS = ('additive', 'multiplicative')
LOSS_SCOPES = ('sequence', 'micro_batch', 'global_batch')
EXCHANGES = ('auto', 'all_to_all', 'ragged_all_to_all', 'all_gather')
DROP_POLICIES = ('none', 'position', 'score', 'batch_priority', 'device')


@dataclasses.dataclass(frozen=True)
class RouterOptions:
  """Options that only some routers read, or that alter the logits of all of them."""

  input_jitter: float  # training: router input times uniform(1 - x, 1 + x) (Switch, 1e-2); 0 = off
  logit_norm_scale: float  # lambda of Skywork-MoE: logits standardised, times this; 0 = off
  random_second_expert: bool  # GShard: training keeps a 2nd expert with probability min(1, 2 g2)
  hash_table: str  # router 'hash': one of HASH_TABLES
  chunk_tokens: int  # router 'expert_choice': tokens that compete; 0 = one row
  shuffle_chunks: bool  # router 'expert_choice': tokens are dealt to chunks at random
  skew: float  # router 'skewed': share of the tokens whose first expert is expert 0
  inference: str  # router 'ds_moe': one of INFERENCE_RULES, used outside of training
  inference_threshold: float  # epsilon of rule 'threshold': active if E * score exceeds it
  replay_path: str  # router 'replay': .npz with expert_idx [layers, rows, L, K] int32
  replay_rows: int  # router 'replay': rows in that file; row r of a batch reads r modulo this


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
  """How tokens reach the devices of the mesh axis `expert`; of no effect where its size is 1."""

  kind: str  # one of EXCHANGES; 'auto' asks the platform
  # Size of the buffers that are received, as a multiple of what balanced experts would fill; what
  # does not fit is not computed, and counted. 0 = the worst case: everything always fits.
  buffer_factor: float


@dataclasses.dataclass(frozen=True)
class ExpertBiasConfig:
  """Loss-free balancing (arXiv 2408.15664): an offset that selects and never weighs."""

  update_rule: str  # one of BIAS_RULES; 'proportional' moves by u * (mean load - load) / mean load
  form: str  # one of BIAS_FORMS: score + bias (from 0) or score * bias (from 1)
  update_rate: float  # u, once per optimizer step
  update_until: float  # share of the run after which the rate is 0 (DeepSeek-V3: 14.3 of 14.8 T)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """One balance loss; formula and value at perfect balance: `moe_jax.balance.balance_losses`."""

  weight: float  # 0 = only reported; summed over the MoE layers
  scope: str  # one of LOSS_SCOPES: the tokens over which load and scores are averaged


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
  """Skywork-MoE's coefficient per layer, driven by the drop rate (arXiv 2406.06563, section 3)."""

  loss: str  # name of the balance loss whose weight it replaces; '' = off
  slope: float  # xi: the target is min(slope * drop rate, max_coefficient)
  max_coefficient: float  # alpha_max, also where it starts
  decay: float  # beta of the moving average
  capacity_factor: float  # without capacity: drop rate that this factor would have caused


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """Any combination of balance losses; all are reported, those with a weight are minimised."""

  expert_level: LossConfig  # DeepSeekMoE, Eq. 12-14
  device_level: LossConfig  # DeepSeekMoE, Eq. 15-17
  communication: LossConfig  # DeepSeek-V2, section 2.2.3
  switch: LossConfig  # Switch Transformer, Eq. 4-6
  gshard: LossConfig  # GShard, Algorithm 1
  squared_deviation: LossConfig  # Skywork-MoE, section 1
  normalized_expert_level: LossConfig  # DeepSeek-V3's sequence-wise loss
  mutual_information: LossConfig  # DS-MoE, section 3.1
  router_z: LossConfig  # ST-MoE, Eq. 5
  attention_mutual_information: LossConfig  # DS-MoE's, of the mixture of attention heads
  adaptive: AdaptiveConfig


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
  """Which (token, expert) assignments are dropped when too many meet."""

  policy: str  # one of DROP_POLICIES; 'device' is DeepSeek-V2's budget per virtual device
  factor: float  # capacity = factor * assignments / experts (or devices), rounded up
  group_rows: int  # rows whose tokens compete for it; 0 = all rows of a forward pass
  exempt_fraction: float  # share of the training rows that never lose a token (V2: 0.1)
  at_eval: bool  # drop outside of training too


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """DeepSeekMoE feed-forward layer: shared experts plus routed fine-grained experts."""

  num_experts: int  # routed experts per layer, E; 0 turns every layer into a dense one
  num_shared_experts: int  # experts that see every token, fused into one FFN
  num_experts_per_tok: int  # K, routed experts that each token visits
  moe_mlp_dim: int  # width F of one expert, shared or routed
  router: str  # one of ROUTERS or REGISTERED: who selects
  score_func: str  # one of SCORE_FUNCS: logits -> scores
  norm_topk_prob: bool  # divide the K gates of a token by their sum
  routed_scaling_factor: float  # factor on every gate, after the division
  num_expert_groups: int  # device-limited routing: groups the experts fall into; 1 = no limit
  num_limited_groups: int  # groups that a token may use
  group_score: str  # one of GROUP_SCORES: max (DeepSeek-V2) or sum of the best two (V3)
  num_virtual_devices: int  # D, for device losses, budgets and figures; any number, on any mesh
  dispatch: str  # one of DISPATCHES: how tokens reach their experts
  # One of GROUPED_MATMULS: kernel of dropless. 'auto' asks the platform; a number format does too,
  # and rounds what the experts' products see in training and wherever dropless computes.
  grouped_matmul: str
  exchange: ExchangeConfig
  options: RouterOptions
  expert_bias: ExpertBiasConfig
  balance: BalanceConfig
  capacity: CapacityConfig

  def loss(self, name: str) -> LossConfig:
    """The settings of the balance loss `name`."""
    return getattr(self.balance, name)


# The router that alone reads an option; the others alter the logits or choices of every router.
OPTION_OF = {
  'hash_table': 'hash',
  'chunk_tokens': 'expert_choice',
  'shuffle_chunks': 'expert_choice',
  'skew': 'skewed',
  'inference': 'ds_moe',
  'inference_threshold': 'ds_moe',
  'replay_path': 'replay',
  'replay_rows': 'replay',
}

LOSSES = tuple(f.name for f in dataclasses.fields(BalanceConfig) if f.type is LossConfig)


def group_size(num_experts: int, num_groups: int) -> int:
  """Experts per group (or virtual device): contiguous blocks, of which the last may be smaller."""
  return -(-num_experts // num_groups)


def validate(moe: MoEConfig):
  """The rules inside `model.moe`; called for models that have experts.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """

  def at_least(minimum, *names):
    return errors.at_least(moe, 'model.moe', minimum, *names)

  at_least(1, 'num_experts_per_tok', 'moe_mlp_dim', 'num_expert_groups', 'num_virtual_devices')
  at_least(0, 'num_shared_experts', 'num_limited_groups')
  errors.choice('model.moe.router', moe.router, [*ROUTERS, *REGISTERED])
  errors.choice('model.moe.score_func', moe.score_func, SCORE_FUNCS)
  errors.choice('model.moe.group_score', moe.group_score, GROUP_SCORES)
  errors.choice('model.moe.dispatch', moe.dispatch, DISPATCHES)
  errors.choice('model.moe.grouped_matmul', moe.grouped_matmul, GROUPED_MATMULS)
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
  errors.choice('model.moe.exchange.kind', moe.exchange.kind, EXCHANGES)
  factor = moe.exchange.buffer_factor
  errors.require(
    factor == 0 or factor >= 1,
    f'config.model.moe.exchange.buffer_factor={factor} must be at least 1, what balanced experts '
    'fill, or 0 for the worst case',
  )
  _validate_groups(moe)
  _validate_options(moe)
  _validate_bias(moe)
  _validate_balance(moe.balance)
  _validate_capacity(moe)


def _validate_groups(moe: MoEConfig):
  e, m = moe.num_experts, moe.num_limited_groups
  for name in ('num_expert_groups', 'num_virtual_devices'):
    groups = getattr(moe, name)
    errors.require(
      group_size(e, groups) * (groups - 1) < e,
      f'config.model.moe.{name}={groups} leaves a group without an expert: {e} experts are cut '
      f'into blocks of {group_size(e, groups)}; choose a divisor of {e}',
    )
  groups = moe.num_expert_groups
  if groups == 1:
    return
  errors.require(
    1 <= m <= groups,
    f'config.model.moe.num_limited_groups={m} must lie between 1 and '
    f'model.moe.num_expert_groups={groups}',
  )
  smallest = m * group_size(e, groups) - (group_size(e, groups) * groups - e)
  errors.require(
    moe.num_experts_per_tok <= smallest,
    f'config.model.moe.num_limited_groups={m} leaves a token as few as {smallest} experts, fewer '
    f'than model.moe.num_experts_per_tok={moe.num_experts_per_tok}; allow more groups',
  )
  errors.require(
    moe.router == 'topk',
    f'config.model.moe.num_expert_groups={groups} limits router topk only, not {moe.router!r}; set '
    'it to 1',
  )


def _validate_options(moe: MoEConfig):
  options, prefix = moe.options, 'config.model.moe.options'
  errors.at_least(
    options, 'model.moe.options', 0, 'logit_norm_scale', 'chunk_tokens', 'inference_threshold'
  )
  errors.at_least(options, 'model.moe.options', 0, 'replay_rows')
  errors.choice('model.moe.options.hash_table', options.hash_table, HASH_TABLES)
  errors.choice('model.moe.options.inference', options.inference, INFERENCE_RULES)
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
  errors.require(
    not options.random_second_expert or moe.router not in ('expert_choice', 'ds_moe'),
    f'{prefix}.random_second_expert=True needs two choices per token, and router {moe.router!r} '
    'has one for every expert; set it to False',
  )
  errors.require(
    moe.router != 'replay' or (bool(options.replay_path) and options.replay_rows > 0),
    f'{prefix}.replay_path={options.replay_path!r} and replay_rows={options.replay_rows} must name '
    "the assignments that router 'replay' reads; experiments.routing --save makes such a file and "
    'says how many rows it has',
  )
  errors.require(
    moe.router != 'skewed' or moe.num_experts_per_tok < moe.num_experts,
    f'config.model.moe.num_experts_per_tok={moe.num_experts_per_tok} must be below '
    f"model.moe.num_experts={moe.num_experts} with router 'skewed'; choose fewer",
  )
  errors.require(
    moe.router != 'hash' or not moe.norm_topk_prob,
    "config.model.moe.norm_topk_prob=True has no effect on router 'hash', whose gates are 1 / K; "
    'set it to False',
  )


def _validate_bias(moe: MoEConfig):
  bias, prefix = moe.expert_bias, 'config.model.moe.expert_bias'
  errors.choice('model.moe.expert_bias.update_rule', bias.update_rule, BIAS_RULES)
  errors.choice('model.moe.expert_bias.form', bias.form, BIAS_FORMS)
  errors.at_least(bias, 'model.moe.expert_bias', 0, 'update_rate')
  errors.require(
    0 <= bias.update_until <= 1,
    f'{prefix}.update_until={bias.update_until} must be a share of the run between 0 and 1',
  )
  errors.require(
    bias.update_rule == 'none' or moe.router == 'topk',
    f'{prefix}.update_rule={bias.update_rule!r} shifts the selection of router topk only, not '
    f"{moe.router!r}; set it to 'none'",
  )


def _validate_balance(balance: BalanceConfig):
  for name in LOSSES:
    loss = getattr(balance, name)
    errors.at_least(loss, f'model.moe.balance.{name}', 0, 'weight')
    errors.choice(f'model.moe.balance.{name}.scope', loss.scope, LOSS_SCOPES)
  adaptive = balance.adaptive
  prefix = 'model.moe.balance.adaptive'
  errors.choice(f'{prefix}.loss', adaptive.loss, ('', *LOSSES[:-1]))
  errors.at_least(adaptive, prefix, 0, 'slope', 'max_coefficient', 'capacity_factor')
  errors.require(
    0 <= adaptive.decay < 1, f'config.{prefix}.decay={adaptive.decay} must lie in [0, 1)'
  )


def _validate_capacity(moe: MoEConfig):
  capacity, prefix = moe.capacity, 'model.moe.capacity'
  errors.choice(f'{prefix}.policy', capacity.policy, DROP_POLICIES)
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
    moe.grouped_matmul not in LOW_PRECISION or moe.dispatch == 'dropless',
    f'config.model.moe.grouped_matmul={moe.grouped_matmul!r} rounds the products of dispatch '
    f"'dropless' only, not of {moe.dispatch!r}; set it to 'auto', or change the dispatch",
  )
  per_expert = capacity.policy in ('position', 'score', 'batch_priority')
  errors.require(
    moe.dispatch != 'capacity' or per_expert or moe.router == 'expert_choice',
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
    moe.router != 'expert_choice' or capacity.policy == 'none',
    f"config.{prefix}.policy={capacity.policy!r} has nothing to drop with router 'expert_choice', "
    "which fills every expert exactly; set it to 'none'",
  )
  errors.require(
    moe.router != 'ds_moe' or (capacity.policy == 'none' and moe.dispatch != 'capacity'),
    f"config.{prefix}.policy={capacity.policy!r}: router 'ds_moe' trains every expert on every "
    "token and drops none; set it to 'none', with dispatch='dense'",
  )


def effective_settings(moe: MoEConfig) -> Mapping[str, object]:
  """Flat settings of `moe` without the options of routers, losses and policies that are off."""
  values = {field.name: getattr(moe, field.name) for field in dataclasses.fields(moe)}
  flat = {k: value for k, value in values.items() if not dataclasses.is_dataclass(value)}
  if moe.num_expert_groups == 1:
    del flat['num_limited_groups'], flat['group_score']
  for name, value in dataclasses.asdict(moe.options).items():
    if value and OPTION_OF.get(name, moe.router) == moe.router:
      flat[f'options.{name}'] = value
  if moe.expert_bias.update_rule != 'none':
    flat |= {f'expert_bias.{k}': v for k, v in dataclasses.asdict(moe.expert_bias).items()}
  for name in LOSSES:
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
