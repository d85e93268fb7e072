"""Statistics of routing: sums over tokens, per expert and device. Padding is never counted.

Every balance loss (`balance_losses`) is a function of a few sums over a set of tokens, `Sums`.
Counts (load, first_load, sent) carry no gradient; it flows through the scores.

Axis letters are those of `moe_jax.models`, P being virtual devices. A token with expert index E
(one past the last) is not routed and not counted.
"""

from typing import NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moe_jax.config import moe_config
from moe_jax.devices import unrolled

Array = jax.Array


class Sums(NamedTuple):
  """What the balance losses know of a set of tokens ([...]: of many sets); adds up over sets."""

  num_tokens: Array  # [...] int32, real tokens
  load: Array  # [..., E] int32, tokens that chose each expert, before anything is dropped
  first_load: Array  # [..., E] int32, tokens that chose each expert with their highest score
  sent: Array  # [..., P] int32, tokens with at least one chosen expert on each virtual device
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


_Sums = TypeVar('_Sums', bound=Sums | MixtureSums)


class RouterStats(struct.PyTreeNode):
  """Routing statistics of one MoE layer in one forward pass; [layers, ...] stacked over layers.

  Sums over real tokens, so that micro-batches and devices add up.
  """

  sums: Sums
  dropped: Array  # [E] int32, chosen assignments that were dropped for capacity
  tokens_sent: Array  # [P, P] int32, tokens of device i (row modulo P) with a kept expert on j
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


def chosen(expert_idx: Array, num_experts: int) -> Array:
  """Which experts a token uses: expert_idx [..., K] int32 -> [..., E] bool."""
  experts, k = jnp.arange(num_experts), expert_idx.shape[-1]
  if not unrolled.pays(k):
    return (expert_idx[..., None] == experts).any(axis=-2)
  return unrolled.reduce(jnp.logical_or, lambda i: expert_idx[..., i, None] == experts, k)


def by_device(values: Array, num_devices: int, fill: float) -> Array:
  """[..., E] -> [..., P, experts per device]; the last device is filled up with `fill`."""
  e = values.shape[-1]
  size = moe_config.group_size(e, num_devices)
  pad = [(0, 0)] * (values.ndim - 1) + [(0, size * num_devices - e)]
  padded = jnp.pad(values, pad, constant_values=fill)
  return padded.reshape(*values.shape[:-1], num_devices, size)


def device_load(load: Array | np.ndarray, num_devices: int) -> np.ndarray:
  """Assignments per virtual device: load [..., E] -> [..., P], on the host."""
  load = np.asarray(load)
  size = moe_config.group_size(load.shape[-1], num_devices)
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
    num_devices: P.

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


def add_up(sums: _Sums) -> _Sums:
  """Adds over the leading axis."""
  return jax.tree.map(lambda a: a.sum(axis=0, dtype=a.dtype), sums)


@overload
def max_vio(load: np.ndarray) -> np.ndarray: ...
@overload
def max_vio(load: Array) -> Array: ...
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
