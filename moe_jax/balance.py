"""Balance bookkeeping: pure functions of routing arrays. Padding is never counted.

Every balance loss is a function of a few sums over a set of tokens (`Sums`). Which set is a choice
of its own, the loss's scope: each sequence by itself, the rows of one forward pass, or the whole
batch of an optimizer step. So all losses come in all scopes, and what a scope means is written
once (`scoped`, `global_slopes`).

Counts (load, first_load, sent) carry no gradient; it flows through the scores. Losses are returned
times the number of tokens they average, so that sequences, micro-batches and devices add up.

Axis letters: B batch, L length, E experts, K experts per token, D virtual devices. A token with
expert index E (one past the last) is not routed and not counted.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moe_jax import config_moe

Array = jax.Array


class Sums(NamedTuple):
  """What the balance losses know of a set of tokens ([...]: of many sets); adds up over sets."""

  num_tokens: Array  # [...] int32, real tokens
  load: Array  # [..., E] int32, tokens that chose each expert, before anything is dropped
  first_load: Array  # [..., E] int32, tokens that chose each expert with their highest score
  sent: Array  # [..., D] int32, tokens with at least one chosen expert on each virtual device
  score: Array  # [..., E] float32, sum of the scores
  prob: Array  # [..., E] float32, sum of the scores after each token's are divided by their sum
  entropy: Array  # [...] float32, sum of the entropies of those, in nats
  squared_log_z: Array  # [...] float32, sum of logsumexp(logits)^2


class MixtureSums(NamedTuple):
  """The same for a mixture of attention heads: what the mutual-information loss needs."""

  num_tokens: Array  # [...] int32
  prob: Array  # [..., number of attention experts] float32
  entropy: Array  # [...] float32
  active: Array  # [...] int32, (token, attention expert) pairs in use


@struct.dataclass
class RouterStats:
  """The books of one MoE layer for one forward pass; [layers, ...] when stacked by the model.

  Sums over real tokens, so that micro-batches and devices add up.
  """

  sums: Sums
  dropped: Array  # [E] int32, chosen assignments that no expert computed
  tokens_sent: Array  # [D, D] int32, tokens of device i (row modulo D) with a kept expert on j
  margin: Array  # [] float32, sum over tokens of worst chosen - best other selection score
  losses: dict[str, Array]  # [] float32 each, token-weighted, see `layer_losses`
  attention: MixtureSums | None  # of a mixture of attention heads
  # [] int32, kept assignments that did not fit the buffers of the exchange and were not computed
  overflow: Array


def expert_load(expert_idx: Array, num_experts: int) -> Array:
  """Tokens per expert and sequence: expert_idx [..., L, K] int32 -> [..., E] int32.

  The sum over experts is the number of routed tokens times K.
  """
  return chosen(expert_idx, num_experts).sum(axis=-2, dtype=jnp.int32)


UNROLLED = 16  # choices per token up to which they are compared one after the other


def chosen(expert_idx: Array, num_experts: int) -> Array:
  """Which experts a token uses: expert_idx [..., K] int32 -> [..., E] bool.

  A CPU reduces an axis that is not the last number by number; K comparisons in a row are one pass.
  """
  experts, k = jnp.arange(num_experts), expert_idx.shape[-1]
  if k > UNROLLED:
    return (expert_idx[..., None] == experts).any(axis=-2)
  none = jnp.zeros((*expert_idx.shape[:-1], num_experts), bool)
  return functools.reduce(
    jnp.logical_or, (expert_idx[..., i, None] == experts for i in range(k)), none
  )


def by_device(values: Array, num_devices: int, fill: float) -> Array:
  """[..., E] -> [..., D, experts per device]; the last device is filled up with `fill`."""
  e = values.shape[-1]
  size = config_moe.group_size(e, num_devices)
  pad = [(0, 0)] * (values.ndim - 1) + [(0, size * num_devices - e)]
  padded = jnp.pad(values, pad, constant_values=fill)
  return padded.reshape(*values.shape[:-1], num_devices, size)


def device_load(load: Array | np.ndarray, num_devices: int) -> np.ndarray:
  """Assignments per virtual device: load [..., E] -> [..., D], on the host."""
  load = np.asarray(load)
  size = config_moe.group_size(load.shape[-1], num_devices)
  return np.add.reduceat(load, np.arange(0, load.shape[-1], size), axis=-1)


def sequence_sums(
  expert_idx: Array, scores: Array, logits: Array | None, mask: Array, num_devices: int
) -> Sums:
  """The sums of each sequence.

  Args:
    expert_idx: [B, L, K] int32; E for padding.
    scores: [B, L, E] float32, 0 for padding.
    logits: [B, L, E] float32, or None for a router without any (squared_log_z is then 0).
    mask: [B, L] bool, False = padding.
    num_devices: D.

  Returns:
    Sums with leading axis B.
  """
  e = scores.shape[-1]
  used = chosen(expert_idx, e)
  first = jnp.where(used, scores, -1.0).argmax(axis=-1, keepdims=True)
  first = jnp.where(used.any(axis=-1, keepdims=True), first, e)
  sent = by_device(used, num_devices, False).any(axis=-1)
  prob = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), 1e-20)
  log_z = jnp.zeros(mask.shape) if logits is None else jax.nn.logsumexp(logits, axis=-1)
  return Sums(
    num_tokens=mask.sum(axis=1, dtype=jnp.int32),
    load=used.sum(axis=1, dtype=jnp.int32),
    first_load=expert_load(first, e),
    sent=sent.sum(axis=1, dtype=jnp.int32),
    score=scores.sum(axis=1),
    prob=prob.sum(axis=1),
    entropy=entropy(prob).sum(axis=1),
    squared_log_z=jnp.where(mask, log_z * log_z, 0.0).sum(axis=1),
  )


def entropy(prob: Array) -> Array:
  """Entropy in nats: prob [..., E] -> [...]; 0 ln 0 = 0, and no gradient at 0."""
  safe = jnp.where(prob > 0, prob, 1.0)
  return -(safe * jnp.log(safe) * (prob > 0)).sum(axis=-1)


def _per_token(total: Array, num_tokens: Array) -> Array:
  """[..., E] / [...], 0 for an empty set."""
  return total / jnp.maximum(num_tokens, 1).astype(jnp.float32)[..., None]


def _frequency(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """f_i = E load_i / sum of loads: 1 for every expert at perfect balance.

  The papers write E / (K T) load_i, which is the same where every token chooses K experts; the sum
  also serves routers with another number per token.
  """
  load = s.load.astype(jnp.float32)  # E times a load may exceed an int32
  return moe.num_experts * load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1.0)


def expert_level(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """sum_i f_i P_i, P_i the mean score (DeepSeekMoE, Eq. 12-14). 1 at perfect balance.

  E / K when every token puts all of its score on the same K experts. With sigmoid scores 1 becomes
  the mean sum of a token's scores (E / 2 at logits 0).
  """
  return (_frequency(s, moe) * _per_token(s.score, s.num_tokens)).sum(axis=-1)


def device_level(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """sum_d f'_d P'_d: f' the mean f, P' the summed P of a device (DeepSeekMoE, Eq. 15-17).

  1 at perfect balance (E / 2 for sigmoid scores at logits 0).
  """
  d = moe.num_virtual_devices
  size = by_device(jnp.ones(moe.num_experts), d, 0.0).sum(axis=-1)
  frequency = by_device(_frequency(s, moe), d, 0.0).sum(axis=-1) / size
  share = by_device(_per_token(s.score, s.num_tokens), d, 0.0).sum(axis=-1)
  return (frequency * share).sum(axis=-1)


def communication(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """sum_d f''_d P'_d with f''_d = D / (M T) tokens sent to device d (DeepSeek-V2, 2.2.3).

  M is the device limit, min(K, D) without one. 1 at perfect balance when each token uses M devices
  (E / 2 for sigmoid scores at logits 0), less when it uses fewer.
  """
  d = moe.num_virtual_devices
  share = by_device(_per_token(s.score, s.num_tokens), d, 0.0).sum(axis=-1)
  return (_per_token(s.sent, s.num_tokens) * (d / device_limit(moe)) * share).sum(axis=-1)


def device_limit(moe: config_moe.MoEConfig) -> int:
  """M: the most virtual devices that a token is counted on to reach."""
  limited = moe.num_expert_groups == moe.num_virtual_devices > 1
  most = moe.num_limited_groups if limited else moe.num_virtual_devices
  return min(most, moe.num_experts_per_tok)


def switch(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """E sum_i f_i P_i with f_i the share of the tokens whose first choice is i (Switch, Eq. 4-6).

  1 at perfect balance (E / 2 for sigmoid scores at logits 0).
  """
  first = _per_token(s.first_load, s.num_tokens)
  return moe.num_experts * (first * _per_token(s.score, s.num_tokens)).sum(axis=-1)


def gshard(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """1 / E sum_i (c_i / S) m_i over first choices (GShard, Algorithm 1): `switch` / E^2.

  1 / E^2 at perfect balance (1 / 2E for sigmoid scores at logits 0).
  """
  return switch(s, moe) / moe.num_experts**2


def squared_deviation(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """sum_i (1 / E - P_i)^2 (Skywork-MoE, section 1). 0 at perfect balance, at most 1 - 1 / E.

  Meant for softmax scores; sigmoid scores at logits 0 give E (1 / 2 - 1 / E)^2.
  """
  mean = _per_token(s.score, s.num_tokens)
  loss = ((1 / moe.num_experts - mean) ** 2).sum(axis=-1)
  return jnp.where(s.num_tokens > 0, loss, 0.0)


def normalized_expert_level(s: Sums, moe: config_moe.MoEConfig) -> Array:
  """`expert_level` with each token's scores divided by their sum (DeepSeek-V3's sequence loss).

  1 at perfect balance, whatever the score function.
  """
  return (_frequency(s, moe) * _per_token(s.prob, s.num_tokens)).sum(axis=-1)


def mutual_information(s: Sums | MixtureSums, unused_moe: config_moe.MoEConfig) -> Array:
  """-H(mean prob) + mean H(prob), minus the mutual information of token and expert (DS-MoE, 3.1).

  -ln E at perfect balance when every token is certain of its expert; 0 when every token spreads
  evenly, which balances too.
  """
  tokens = jnp.maximum(s.num_tokens, 1).astype(jnp.float32)
  return -entropy(_per_token(s.prob, s.num_tokens)) + s.entropy / tokens


def router_z(s: Sums, unused_moe: config_moe.MoEConfig) -> Array:
  """Mean squared logsumexp of the logits (ST-MoE, Eq. 5): (ln E)^2 when all logits are 0."""
  return s.squared_log_z / jnp.maximum(s.num_tokens, 1).astype(jnp.float32)


LOSSES: Mapping[str, Callable[[Sums, config_moe.MoEConfig], Array]] = {
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


def value_at_balance(name: str, moe: config_moe.MoEConfig) -> float:
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


def add_up(sums: Sums | MixtureSums) -> Sums | MixtureSums:
  """Adds over the leading axis."""
  return jax.tree.map(lambda a: a.sum(axis=0, dtype=a.dtype), sums)


def _weighted(fn: Callable, s: Sums | MixtureSums, moe: config_moe.MoEConfig) -> Array:
  return (fn(s, moe) * s.num_tokens).sum()


def scoped(
  fn: Callable,
  moe: config_moe.MoEConfig,
  scope: str,
  per_sequence: Sums | MixtureSums,
  slopes: Mapping[str, Array] | None,
) -> Array:
  """A loss of one layer times the number of tokens, [] float32, before its weight.

  Args:
    fn: the loss, a function of sums.
    moe: settings that it may read.
    scope: one of config_moe.LOSS_SCOPES.
    per_sequence: sums of the rows of a forward pass, leading axis B.
    slopes: None, or the entry of `global_slopes`: a loss of scope global_batch then becomes its
      linear part around the whole batch, whose gradients add up to the loss's over micro-batches.
  """
  if scope == 'sequence':
    return _weighted(fn, per_sequence, moe)
  total = add_up(per_sequence)
  if scope == 'global_batch' and slopes is not None:
    return _along(slopes, total)
  return _weighted(fn, total, moe)


def layer_losses(
  moe: config_moe.MoEConfig, per_sequence: Sums, slopes: Mapping[str, Mapping[str, Array]]
) -> dict[str, Array]:
  """All of `LOSSES` for one layer, by name; see `scoped`."""
  return {
    name: scoped(fn, moe, moe.loss(name).scope, per_sequence, slopes.get(name))
    for name, fn in LOSSES.items()
  }


def _split(s: Sums | MixtureSums) -> tuple[dict[str, Array], dict[str, Array]]:
  """(fields that carry gradients, counts)."""
  fields = s._asdict()
  real = {k: v for k, v in fields.items() if jnp.issubdtype(v.dtype, jnp.floating)}
  return real, {k: v for k, v in fields.items() if k not in real}


def _slopes_of(fn: Callable, s: Sums | MixtureSums, moe: config_moe.MoEConfig) -> dict[str, Array]:
  """Gradient of num_tokens * fn with respect to the real-valued sums, summed over leading axes."""
  real, counts = _split(s)
  return jax.grad(lambda real: _weighted(fn, type(s)(**real, **counts), moe))(real)


def _along(slopes: Mapping[str, Array], s: Sums | MixtureSums) -> Array:
  """The inner product of slopes (constants for autodiff) and the real-valued sums."""
  real, _ = _split(s)
  return sum(jnp.vdot(jax.lax.stop_gradient(slopes[k]), v) for k, v in real.items())


def global_slopes(moe: config_moe.MoEConfig, stats: RouterStats) -> dict[str, dict[str, Array]]:
  """Slopes of all losses of scope global_batch.

  Args:
    moe: the scopes.
    stats: of the whole batch, leaves [layers, ...].

  Returns:
    {name: {field of Sums: array of its shape}}; empty if no loss has that scope.
  """
  wanted = [name for name in config_moe.LOSSES if moe.loss(name).scope == 'global_batch']
  found = {k: _slopes_of(LOSSES[k], stats.sums, moe) for k in wanted if k in LOSSES}
  if 'attention_mutual_information' in wanted and stats.attention is not None:
    found['attention_mutual_information'] = _slopes_of(mutual_information, stats.attention, moe)
  return found


def refreshed(moe: config_moe.MoEConfig, stats: RouterStats) -> RouterStats:
  """`stats` of a whole batch with the true values of its losses of scope global_batch.

  After accumulation those hold sums of linear parts, right in their gradient only.
  """
  losses = dict(stats.losses)
  for name in losses:
    if moe.loss(name).scope != 'global_batch':
      continue
    s = stats.attention if name == 'attention_mutual_information' else stats.sums
    losses[name] = LOSSES.get(name, mutual_information)(s, moe) * s.num_tokens
  return stats.replace(losses=losses)


def max_vio(load: Array | np.ndarray) -> Array | np.ndarray:
  """MaxVio = (max load - mean load) / mean load over the experts (arXiv 2408.15664, section 4.1).

  Args:
    load: [..., E] token counts.

  Returns:
    [...]; 0 is perfect balance, E - 1 is every token on one expert (K = 1). 0 where nothing was
    routed.
  """
  xp = np if isinstance(load, np.ndarray) else jnp
  mean = xp.maximum(load.mean(axis=-1), 1e-9)
  return load.max(axis=-1) / mean - (load.max(axis=-1) > 0)
