"""DeepSeekMoE's feed-forward layer: shared experts + routed experts (arXiv 2401.06066, section 3).

h_t = u_t + shared(u_t) + sum over the K chosen experts of gate * expert(u_t); the residual u_t is
added by the block. The layer holds the parameters and calls the steps in order: `decision` (logits,
the router's selection, what is dropped of it), `routed_experts` (dispatch, exchange, grouped
products), `router_stats` and `loss_scopes` (loads and balance losses).
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.balance import loss_scopes, router_stats
from moe_jax.config import moe_config
from moe_jax.models import layers, routed_experts
from moe_jax.models.routers import ROUTERS, decision, routing
from moe_jax.models.routers import state as state_lib

Array = jax.Array


# Collection of what an experiment on a trained model changes, [layers] each: `disabled` int32, how
# many of a token's best experts it may not use; `shared_scale` float32, times the shared experts.
INTERVENTION = 'intervention'


class MoE(nn.Module):
  """Routed experts with stacked kernels, plus the shared experts as one fused FFN."""

  cfg: moe_config.MoEConfig
  sizes: routing.Sizes
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  train: bool

  shared_type: ClassVar[type[layers.FeedForward]] = layers.FeedForward

  @nn.compact
  def __call__(
    self,
    x: Array,
    tokens: routing.Tokens,
    layer: Array,
    slopes: Mapping[str, Any],
    experts: Array | None = None,
  ) -> tuple[Array, router_stats.RouterStats | None]:
    """Applies the layer.

    Args:
      x: [B, L, D].
      tokens: the batch as routing sees it.
      layer: [] int32, number of the layer.
      slopes: see `loss_scopes.layer_losses`.
      experts: [B, L, K] int32, recorded choices, see `decision.replayed`; None: the router's own.

    Returns:
      ([B, L, D], the routing statistics; None at initialisation, when nothing is routed).
    """
    cfg, router = self.cfg, ROUTERS[self.cfg.router]
    # Made first, since initial numbers depend on the order: those of the experts do not depend on
    # the router.
    kernels = self._expert_kernels(x.shape[-1])
    router_kernel = self._router_kernel(x.shape[-1]) if router.traits.has_logits else None
    state = self._router_state(router)
    shared = self._shared(x)
    if self.is_initializing():
      return shared, None
    if self.has_variable(INTERVENTION, INTERVENTION):  # by `analysis.interventions`
      intervention = self.get_variable(INTERVENTION, INTERVENTION)
      state |= {'disabled': intervention['disabled']}
      shared *= intervention['shared_scale'].astype(shared.dtype)
    with jax.named_scope('router'):
      logits = None
      if router_kernel is not None:
        logits = decision.logits_of(cfg, self.train, x, router_kernel, tokens, layer)
      selected, selection = decision.select(cfg, router, self.train, logits, tokens, layer, state)
      if experts is not None and logits is not None:
        selected = decision.replayed(cfg, selected, experts, tokens)
      kept = decision.drop(cfg, self.train, selected, tokens, layer)
    self.sow('intermediates', 'gates', selected.gates)
    self.sow('intermediates', 'expert_idx', selected.expert_idx)
    self.sow('intermediates', 'scores', selected.scores)
    # XLA computes the shared experts, which depend on no exchange, while tokens travel.
    out, overflow = self._experts(x, kept, kernels)
    out += shared
    with jax.named_scope('router_stats'):
      stats = _statistics(cfg, selected, kept, logits, selection, tokens, slopes)
      return out, stats.replace(overflow=overflow.sum(dtype=jnp.int32))

  def _shared(self, x: Array) -> Array:
    """The shared experts, [B, L, D]; 0 without any."""
    cfg = self.cfg
    if not cfg.num_shared_experts:
      return jnp.zeros_like(x)
    width = cfg.num_shared_experts * cfg.moe_mlp_dim
    ffn = self.shared_type(width, self.init_std, self.dtype, self.param_dtype, name='shared')
    with jax.named_scope('shared'):
      return ffn(x)

  def _router_state(self, router: routing.Router) -> dict[str, Array]:
    """The layer's variables of collection `router_state`, made if this is the initialisation."""
    make = functools.partial(state_lib.init, self.cfg, router, self.sizes)
    if self.is_initializing():
      for name, value in make(self.make_rng('params')).items():
        self.put_variable('router_state', name, value)
    names = jax.eval_shape(lambda: make(jax.random.key(0)))
    return {name: self.get_variable('router_state', name) for name in names}

  def _experts(
    self, x: Array, kept: routing.Routing, kernels: routed_experts.Kernels
  ) -> tuple[Array, Array]:
    """The routed experts' output; its name is the scope of what belongs to no step of them."""
    return routed_experts.apply(self.cfg, self.train, x, kept.gates, kept.expert_idx, kernels)

  def _router_kernel(self, d: int) -> Array:
    init = layers.init_weight(self.init_std, 'router_embed', 'router_expert')
    return self.param('router', init, (d, self.cfg.num_experts), jnp.float32)

  def _expert_kernels(self, d: int) -> routed_experts.Kernels:
    """The experts' parameters in the compute dtype."""
    e, f = self.cfg.num_experts, self.cfg.moe_mlp_dim
    init = functools.partial(layers.init_weight, self.init_std)
    gate_up_init, down_init = init(*routed_experts.GATE_UP_AXES), init(*routed_experts.DOWN_AXES)
    gate_up = self.param('gate_up', gate_up_init, (e, d, 2, f), self.param_dtype)
    down = self.param('down', down_init, (e, f, d), self.param_dtype)
    return routed_experts.Kernels(gate_up.astype(self.dtype), down.astype(self.dtype))


def _statistics(
  cfg: moe_config.MoEConfig,
  selected: routing.Routing,
  kept: routing.Routing,
  logits: Array | None,
  selection: Array | None,
  tokens: routing.Tokens,
  slopes: Mapping[str, Any],
) -> router_stats.RouterStats:
  """The layer's figures: loads and losses of what was chosen, traffic of what was kept."""
  e, d = cfg.num_experts, cfg.num_virtual_devices
  per_sequence = router_stats.sequence_sums(
    selected.expert_idx, selected.scores, logits, tokens.mask, d
  )
  sums = router_stats.add_up(per_sequence)
  used = router_stats.chosen(kept.expert_idx, e)
  sent = router_stats.by_device(used, d, False).any(axis=-1).sum(axis=1, dtype=jnp.int32)
  home = jax.nn.one_hot(tokens.row % d, d, dtype=jnp.int32)
  return router_stats.RouterStats(
    sums=sums,
    dropped=sums.load - used.sum(axis=(0, 1), dtype=jnp.int32),
    tokens_sent=(home[:, :, None] * sent[:, None, :]).sum(axis=0),
    margin=_margin(selected, selection, tokens.mask),
    losses=loss_scopes.layer_losses(cfg, per_sequence, slopes),
    attention=None,
    overflow=jnp.int32(0),
  )


def _margin(selected: routing.Routing, selection: Array | None, mask: Array) -> Array:
  """Sum over real tokens of the worst chosen selection score minus the best other one.

  Tokens without a choice, or without another expert within reach, count 0.
  """
  if selection is None:
    return jnp.zeros(())
  used = router_stats.chosen(selected.expert_idx, selection.shape[-1])
  worst = jnp.where(used, selection, jnp.inf).min(axis=-1)
  other = jnp.where(used, -jnp.inf, selection).max(axis=-1)
  both = jnp.isfinite(worst) & jnp.isfinite(other) & mask
  # Inner where: infinity minus infinity would be a NaN.
  return jnp.where(both, jnp.where(both, worst, 0.0) - jnp.where(both, other, 0.0), 0.0).sum()
