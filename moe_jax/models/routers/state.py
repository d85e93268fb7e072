"""What routing remembers between steps: variable collection `router_state`, one dict per layer.

It is saved with the model and used at evaluation. The optimizer never sees it: `update` is applied
once per optimizer step, outside of autodiff, to the loads of the whole batch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.balance import router_stats
from moe_jax.config import moe_config
from moe_jax.models.routers import routing

Array = jax.Array


def init(
  cfg: moe_config.MoEConfig, router: routing.Router, sizes: routing.Sizes, rng: Array
) -> dict[str, Array]:
  """The state of one layer at step 0; empty for a router without any."""
  state = router.init_state(cfg, sizes, rng) if router.init_state else {}
  if cfg.expert_bias.update_rule != 'none':
    start = 1.0 if cfg.expert_bias.form == 'multiplicative' else 0.0
    state['expert_bias'] = jnp.full(cfg.num_experts, start, jnp.float32)
  if cfg.balance.adaptive.loss:
    state['loss_coefficient'] = jnp.float32(cfg.balance.adaptive.max_coefficient)
  return state


def update(
  cfg: moe_config.MoEConfig,
  state: Mapping[str, Array],
  stats: router_stats.RouterStats,
  share: Array,
) -> dict[str, Array]:
  """The state after a step.

  Args:
    cfg: the rules.
    state: leaves [layers, ...].
    stats: of the whole batch, leaves [layers, ...].
    share: [] float32, steps done before this one / steps of the run.

  Returns:
    The same dict with `expert_bias` and `loss_coefficient` moved.
  """
  new = dict(state)
  if 'expert_bias' in state:
    new['expert_bias'] = state['expert_bias'] + bias_step(cfg.expert_bias, stats.sums.load, share)
  if 'loss_coefficient' in state:
    new['loss_coefficient'] = _coefficient(cfg, state['loss_coefficient'], stats)
  return new


def bias_step(cfg: moe_config.ExpertBiasConfig, load: Array, share: Array) -> Array:
  """What the bias moves by: load [..., E] -> [..., E] (arXiv 2408.15664, Algorithm 1).

  With e = mean load - load: u sign(e), or u e / mean load for 'proportional', whose normalisation
  the paper leaves open. 0 once `share` has reached `update_until`.
  """
  load = load.astype(jnp.float32)
  mean = load.mean(axis=-1, keepdims=True)
  error = mean - load
  step = jnp.sign(error) if cfg.update_rule == 'sign' else error / jnp.maximum(mean, 1.0)
  return jnp.where(share < cfg.update_until, cfg.update_rate, 0.0) * step


def _coefficient(cfg: moe_config.MoEConfig, old: Array, stats: router_stats.RouterStats) -> Array:
  """beta old + (1 - beta) min(xi d, alpha_max), [layers] (Skywork-MoE, section 3)."""
  adaptive = cfg.balance.adaptive
  target = jnp.minimum(adaptive.slope * drop_rate(cfg, stats), adaptive.max_coefficient)
  return adaptive.decay * old + (1 - adaptive.decay) * target


def drop_rate(cfg: moe_config.MoEConfig, stats: router_stats.RouterStats) -> Array:
  """Dropped share of the assignments, [layers].

  Without capacity: the share above `adaptive.capacity_factor` times the mean load, which is what
  that capacity would have dropped.
  """
  load = stats.sums.load.astype(jnp.float32)
  if cfg.capacity.policy == 'none':
    room = cfg.balance.adaptive.capacity_factor * load.mean(axis=-1, keepdims=True)
    lost = jnp.maximum(load - room, 0.0).sum(axis=-1)
  else:
    lost = stats.dropped.sum(axis=-1).astype(jnp.float32)
  return lost / jnp.maximum(load.sum(axis=-1), 1.0)
