"""Balance losses: each a pure function of the sums over a set of tokens (`router_stats.Sums`).

A loss's value at perfect balance stands in its docstring. Which set of tokens a loss averages over
is its scope, see `loss_scopes`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.balance import router_stats
from moe_jax.config import moe_config

Array = jax.Array


def _per_token(total: Array, num_tokens: Array) -> Array:
  """[..., E] / [...], 0 for an empty set."""
  return total / jnp.maximum(num_tokens, 1).astype(jnp.float32)[..., None]


def _frequency(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """f_i = E load_i / sum of loads: 1 for every expert at perfect balance.

  The papers write E / (K T) load_i, which is the same where every token chooses K experts; the sum
  also serves routers with another number per token.
  """
  load = s.load.astype(jnp.float32)  # E times a load may exceed an int32
  return moe.num_experts * load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1.0)


def expert_level(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """sum_i f_i P_i, P_i the mean score (DeepSeekMoE, Eq. 12-14). 1 at perfect balance.

  E / K when every token puts all of its score on the same K experts. With sigmoid scores 1 becomes
  the mean sum of a token's scores (E / 2 at logits 0).
  """
  return (_frequency(s, moe) * _per_token(s.score, s.num_tokens)).sum(axis=-1)


def device_level(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """sum_d f'_d P'_d: f' the mean f, P' the summed P of a device (DeepSeekMoE, Eq. 15-17).

  1 at perfect balance (E / 2 for sigmoid scores at logits 0).
  """
  d = moe.num_virtual_devices
  size = router_stats.by_device(jnp.ones(moe.num_experts), d, 0.0).sum(axis=-1)
  frequency = router_stats.by_device(_frequency(s, moe), d, 0.0).sum(axis=-1) / size
  share = router_stats.by_device(_per_token(s.score, s.num_tokens), d, 0.0).sum(axis=-1)
  return (frequency * share).sum(axis=-1)


def communication(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """sum_d f''_d P'_d with f''_d = P / (M T) tokens sent to device d (DeepSeek-V2, 2.2.3).

  M is the device limit, min(K, P) without one. 1 at perfect balance when each token uses M devices
  (E / 2 for sigmoid scores at logits 0), less when it uses fewer.
  """
  d = moe.num_virtual_devices
  share = router_stats.by_device(_per_token(s.score, s.num_tokens), d, 0.0).sum(axis=-1)
  return (_per_token(s.sent, s.num_tokens) * (d / device_limit(moe)) * share).sum(axis=-1)


def device_limit(moe: moe_config.MoEConfig) -> int:
  """M: the most virtual devices that a token is counted on to reach."""
  limited = moe.num_expert_groups == moe.num_virtual_devices > 1
  most = moe.num_limited_groups if limited else moe.num_virtual_devices
  return min(most, moe.num_experts_per_tok)


def switch(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """E sum_i f_i P_i with f_i the share of the tokens whose first choice is i (Switch, Eq. 4-6).

  1 at perfect balance (E / 2 for sigmoid scores at logits 0).
  """
  first = _per_token(s.first_load, s.num_tokens)
  return moe.num_experts * (first * _per_token(s.score, s.num_tokens)).sum(axis=-1)


def gshard(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """1 / E sum_i (c_i / S) m_i over first choices (GShard, Algorithm 1): `switch` / E^2.

  1 / E^2 at perfect balance (1 / 2E for sigmoid scores at logits 0).
  """
  return switch(s, moe) / moe.num_experts**2


def squared_deviation(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """sum_i (1 / E - P_i)^2 (Skywork-MoE, section 1). 0 at perfect balance, at most 1 - 1 / E.

  Meant for softmax scores; sigmoid scores at logits 0 give E (1 / 2 - 1 / E)^2.
  """
  mean = _per_token(s.score, s.num_tokens)
  loss = ((1 / moe.num_experts - mean) ** 2).sum(axis=-1)
  return jnp.where(s.num_tokens > 0, loss, 0.0)


def normalized_expert_level(s: router_stats.Sums, moe: moe_config.MoEConfig) -> Array:
  """`expert_level` with each token's scores divided by their sum (DeepSeek-V3's sequence loss).

  1 at perfect balance, whatever the score function.
  """
  return (_frequency(s, moe) * _per_token(s.prob, s.num_tokens)).sum(axis=-1)


def mutual_information(
  s: router_stats.Sums | router_stats.MixtureSums, unused_moe: moe_config.MoEConfig
) -> Array:
  """-H(mean prob) + mean H(prob), minus the mutual information of token and expert (DS-MoE, 3.1).

  -ln E at perfect balance when every token is certain of its expert; 0 when every token spreads
  evenly, which balances too.
  """
  tokens = jnp.maximum(s.num_tokens, 1).astype(jnp.float32)
  return -router_stats.entropy(_per_token(s.prob, s.num_tokens)) + s.entropy / tokens


def router_z(s: router_stats.Sums, unused_moe: moe_config.MoEConfig) -> Array:
  """Mean squared logsumexp of the logits (ST-MoE, Eq. 5): (ln E)^2 when all logits are 0."""
  return s.squared_log_z / jnp.maximum(s.num_tokens, 1).astype(jnp.float32)


LOSSES: Mapping[str, Callable[[router_stats.Sums, moe_config.MoEConfig], Array]] = {
  'expert_level': expert_level,
  'device_level': device_level,
  'communication': communication,
  'switch': switch,
  'gshard': gshard,
  'squared_deviation': squared_deviation,
  'normalized_expert_level': normalized_expert_level,
  'mutual_information': mutual_information,
  'router_z': router_z,
}


def value_at_balance(name: str, moe: moe_config.MoEConfig) -> float:
  """The value of a loss, before its weight, at perfect balance.

  Every expert has the same load and the same mean score, each token uses `device_limit` devices;
  sigmoid scores are those of logits 0; for mutual_information every token is certain; for router_z
  all logits are 0.
  """
  e = moe.num_experts
  score_sum = 1.0 if moe.score_func == 'softmax' else e / 2
  return {
    'expert_level': score_sum,
    'device_level': score_sum,
    'communication': score_sum,
    'switch': score_sum,
    'gshard': score_sum / e**2,
    'squared_deviation': (score_sum - 1) ** 2 / e,
    'normalized_expert_level': 1.0,
    'mutual_information': -math.log(e),
    'router_z': math.log(e) ** 2,
  }[name]
