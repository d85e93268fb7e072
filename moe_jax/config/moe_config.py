"""What every field of `model.moe` means, and its type.

Selection, gating, balancing, capacity and dispatch are independent choices: each has its own field
or section, and any value of one may meet any value of another unless `moe_rules` says why not.
"""

import dataclasses

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
  router: str  # one of `router_traits.known()`: who selects
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


LOSSES = tuple(f.name for f in dataclasses.fields(BalanceConfig) if f.type is LossConfig)


def group_size(num_experts: int, num_groups: int) -> int:
  """Experts per group (or virtual device): contiguous blocks, of which the last may be smaller."""
  return -(-num_experts // num_groups)
