"""From the router's input to scores, and from scores to selection scores.

Scores decide how much an expert counts; selection scores decide who is chosen. The expert bias and
the limits of device-limited routing touch the second only, so that balancing never bends a gate.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import integer_hash
from moe_jax.balance import router_stats
from moe_jax.config import moe_config
from moe_jax.models.routers import routing

Array = jax.Array

SCORE_FUNCS = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


def jitter(x: Array, tokens: routing.Tokens, layer: Array, amount: float) -> Array:
  """x [B, L, D] times uniform(1 - amount, 1 + amount), per element (Switch, section 2.4)."""
  key = routing.token_noise(tokens, layer, salt=1)
  noise = integer_hash.uniform(integer_hash.combine(key[..., None], jnp.arange(x.shape[-1])))
  return x * (1 + amount * (2 * noise - 1))


def normalise_logits(logits: Array, scale: float) -> Array:
  """scale * (z - mean) / std over each token's experts, [B, L, E] (Skywork-MoE, section 2).

  Population standard deviation plus 1e-6, where the report is silent; gradients flow through both.
  """
  centred = logits - logits.mean(axis=-1, keepdims=True)
  variance = (centred * centred).mean(axis=-1, keepdims=True)
  # The square root has no gradient at 0, where all logits of a token are equal.
  std = jnp.sqrt(jnp.maximum(variance, 1e-20))
  return scale * centred / (std + 1e-6)


def selection(scores: Array, state: Mapping[str, Array], cfg: moe_config.MoEConfig) -> Array:
  """What the best K are taken of: [B, L, E] scores moved by the bias, -inf out of reach."""
  found = scores
  if 'expert_bias' in state:
    bias = state['expert_bias']
    found = found * bias if cfg.expert_bias.form == 'multiplicative' else found + bias
  if 'disabled' in state:
    found = jnp.where(_rank(scores) < state['disabled'], -jnp.inf, found)
  if cfg.num_expert_groups > 1:
    found = limit_groups(found, cfg)
  return jax.lax.stop_gradient(found)


def _rank(scores: Array) -> Array:
  """[B, L, E] int32, how many of the token's experts score better; of equals, the first do."""
  return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)


def limit_groups(scores: Array, cfg: moe_config.MoEConfig) -> Array:
  """Sets all but the best `num_limited_groups` groups of experts to -inf, per token.

  A group counts by its best score (DeepSeek-V2, section 2.2.2) or by the sum of its best two (V3).
  -inf, not 0: biased scores may be negative.
  """
  groups = router_stats.by_device(scores, cfg.num_expert_groups, -jnp.inf)
  best = groups.max(axis=-1)
  if cfg.group_score == 'top2_sum':
    first = jnp.arange(groups.shape[-1]) == groups.argmax(axis=-1)[..., None]
    second = jnp.where(first, -jnp.inf, groups).max(axis=-1)
    best += jnp.where(jnp.isfinite(second), second, 0.0)  # a group of one expert has no second
  kept = routing.keep_best(best, cfg.num_limited_groups)
  within = router_stats.chosen(kept, cfg.num_expert_groups)
  flat = jnp.where(within[..., None], groups, -jnp.inf)
  return flat.reshape(*scores.shape[:-1], -1)[..., : scores.shape[-1]]
