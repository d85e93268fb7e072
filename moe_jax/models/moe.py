"""DeepSeekMoE's feed-forward layer: shared experts + routed experts (arXiv 2401.06066, section 3).

h_t = u_t + shared(u_t) + sum over the K chosen experts of gate * expert(u_t); the residual u_t is
added by the block. Here the layer only wires the rooms together: scoring and a router decide,
capacity drops, a dispatch moves the tokens, `balance` keeps the books.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import balance, config_moe, partitioning
from moe_jax.models import capacity, layers
from moe_jax.models.dispatch import DISPATCHES, gather
from moe_jax.models.routers import ROUTERS, gshard, routing, scoring
from moe_jax.models.routers import state as state_lib

Array = jax.Array


GATE_UP_AXES = ('expert', 'expert_embed', 'gate_up', 'expert_mlp')
DOWN_AXES = ('expert', 'expert_mlp', 'expert_embed')


def drops(cfg: config_moe.MoEConfig, train: bool) -> bool:
  """Whether a limited capacity is enforced: in training, and elsewhere only if asked."""
  return cfg.capacity.policy != 'none' and (train or cfg.capacity.at_eval)


def _dispatch_name(cfg: config_moe.MoEConfig, train: bool, num_choices: int) -> str:
  """Buffers of a fixed size serve where routing bounds them; elsewhere nothing may be lost.

  Outside of training, few choices are served by the weights of their experts alone.
  """
  bounded = drops(cfg, train) or cfg.router == 'expert_choice'
  name = cfg.dispatch if cfg.dispatch != 'capacity' or bounded else 'dropless'
  few = not train and num_choices <= gather.STREAMED_CHOICES * cfg.num_experts
  return 'gather' if name == 'dropless' and few else name


class MoE(nn.Module):
  """Routed experts with stacked kernels, plus the shared experts as one fused FFN."""

  cfg: config_moe.MoEConfig
  sizes: routing.Sizes
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  train: bool

  @nn.compact
  def __call__(
    self, x: Array, tokens: routing.Tokens, layer: Array, slopes: Mapping[str, Any]
  ) -> tuple[Array, balance.RouterStats | None]:
    """Applies the layer.

    Args:
      x: [B, L, D].
      tokens: the batch as routing sees it.
      layer: [] int32, number of the layer.
      slopes: see `balance.layer_losses`.

    Returns:
      ([B, L, D], the books; None while parameters are made, when nothing is routed).
    """
    cfg, router = self.cfg, ROUTERS[self.cfg.router]
    # The experts' weights are made first: their random numbers do not depend on the router.
    laid_out = self.get_variable('kernels', 'kernels')  # by `decode.unstack`
    kernels = (laid_out,) if laid_out else self._expert_kernels(x.shape[-1])
    kernel = self._router_kernel(x.shape[-1]) if router.has_logits else None
    state = self._router_state(router)
    shared = self._shared(x)
    if self.is_initializing():
      return shared, None
    with jax.named_scope('router'):
      logits = None if kernel is None else self._logits(x, kernel, tokens, layer)
      selected, selection = self._select(router, logits, tokens, layer, state)
      kept = self._drop(selected, tokens, layer)
    self.sow('intermediates', 'expert_idx', selected.expert_idx)
    routed = partitioning.over_row_shards(functools.partial(self._experts, len(x)), num_row_args=3)
    out = routed(x, kept.gates, kept.expert_idx, *kernels) + shared
    with jax.named_scope('books'):
      return out, _books(cfg, selected, kept, logits, selection, tokens, slopes)

  def _shared(self, x: Array) -> Array:
    """The shared experts, [B, L, D]; 0 without any."""
    cfg = self.cfg
    if not cfg.num_shared_experts:
      return jnp.zeros_like(x)
    width = cfg.num_shared_experts * cfg.moe_mlp_dim
    ffn = layers.FeedForward(width, self.init_std, self.dtype, self.param_dtype, name='shared')
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

  def _logits(self, x: Array, kernel: Array, tokens: routing.Tokens, layer: Array) -> Array:
    """[B, L, E] in float32 whatever the compute dtype: rounding them would reorder experts."""
    options, x = self.cfg.options, x.astype(jnp.float32)
    if self.train and options.input_jitter:
      x = scoring.jitter(x, tokens, layer, options.input_jitter)
    logits = jnp.einsum('BLD,DE->BLE', x, kernel, precision=jax.lax.Precision.HIGHEST)
    if options.logit_norm_scale:
      logits = scoring.normalise_logits(logits, options.logit_norm_scale)
    return logits

  def _select(
    self,
    router: routing.Router,
    logits: Array | None,
    tokens: routing.Tokens,
    layer: Array,
    state: Mapping[str, Array],
  ) -> tuple[routing.Routing, Array | None]:
    """The router's decision for the real tokens, and the selection scores [B, L, E]."""

    def decide(per_row, seed, layer, state):
      logits, ids, mask, row, place = per_row
      tokens = routing.Tokens(ids, mask, row, seed, place)
      scores = selection = None
      if logits is not None:
        scores = scoring.SCORE_FUNCS[self.cfg.score_func](logits)
        selection = scoring.selection(scores, state, self.cfg)
      inputs = routing.Inputs(scores, selection, tokens, layer, state)
      return routing.without(router.route(inputs, self.cfg, self.train), tokens.mask), selection

    # XLA would gather the scores of all devices for the top-k.
    mapped = decide if router.across_rows else partitioning.over_row_shards(decide, 1)
    per_row = (logits, tokens.ids, tokens.mask, tokens.row, tokens.place)
    return mapped(per_row, tokens.seed, layer, state)

  def _drop(
    self, decision: routing.Routing, tokens: routing.Tokens, layer: Array
  ) -> routing.Routing:
    """Takes out the choices that are not computed."""
    cfg = self.cfg
    if self.train and cfg.options.random_second_expert:
      keep = gshard.keeps_second(cfg, decision, tokens, layer)
      decision = routing.without_choices(decision, keep)
    if drops(cfg, self.train):
      if not self.train:  # exempt rows are a rule of training
        room = dataclasses.replace(cfg.capacity, exempt_fraction=0.0)
        cfg = dataclasses.replace(cfg, capacity=room)
      decision = routing.without_choices(decision, capacity.keep(cfg, decision, tokens))
    return decision

  def _experts(
    self, total_rows: int, x: Array, gates: Array, expert_idx: Array, *kernels: Any
  ) -> Array:
    """x [B, L, D] of one device, gates and expert_idx [B, L, K] -> each token's gated sum."""
    name = _dispatch_name(self.cfg, self.train, expert_idx.size)
    slots = capacity.slots(self.cfg, *x.shape[:2], total_rows) if name == 'capacity' else 0
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, gates, expert_idx)]
    if len(kernels) == 1:  # laid out
      out = gather.apply(*flat, *kernels)
    else:
      out = DISPATCHES[name](*flat, *kernels, self.cfg.grouped_matmul, slots)
    return out.reshape(x.shape)

  def _router_kernel(self, d: int) -> Array:
    init = layers.init_weight(self.init_std, 'router_embed', 'router_expert')
    return self.param('router', init, (d, self.cfg.num_experts), jnp.float32)

  def _expert_kernels(self, d: int) -> tuple[Array, Array]:
    """gate_up [E, D, 2, F] and down [E, F, D] in the compute dtype."""
    e, f = self.cfg.num_experts, self.cfg.moe_mlp_dim
    init = functools.partial(layers.init_weight, self.init_std)
    gate_up = self.param('gate_up', init(*GATE_UP_AXES), (e, d, 2, f), self.param_dtype)
    down = self.param('down', init(*DOWN_AXES), (e, f, d), self.param_dtype)
    return gate_up.astype(self.dtype), down.astype(self.dtype)


def _books(
  cfg: config_moe.MoEConfig,
  selected: routing.Routing,
  kept: routing.Routing,
  logits: Array | None,
  selection: Array | None,
  tokens: routing.Tokens,
  slopes: Mapping[str, Any],
) -> balance.RouterStats:
  """The layer's figures: loads and losses of what was chosen, traffic of what was kept."""
  e, d = cfg.num_experts, cfg.num_virtual_devices
  per_sequence = balance.sequence_sums(selected.expert_idx, selected.scores, logits, tokens.mask, d)
  sums = balance.add_up(per_sequence)
  used = balance.chosen(kept.expert_idx, e)
  sent = balance.by_device(used, d, False).any(axis=-1).sum(axis=1, dtype=jnp.int32)
  home = jax.nn.one_hot(tokens.row % d, d, dtype=jnp.int32)
  return balance.RouterStats(
    sums=sums,
    dropped=sums.load - used.sum(axis=(0, 1), dtype=jnp.int32),
    tokens_sent=(home[:, :, None] * sent[:, None, :]).sum(axis=0),
    margin=_margin(selected, selection, tokens.mask),
    losses=balance.layer_losses(cfg, per_sequence, slopes),
    attention=None,
  )


def _margin(selected: routing.Routing, selection: Array | None, mask: Array) -> Array:
  """Sum over real tokens of the worst chosen selection score minus the best other one.

  Tokens without a choice, or without another expert within reach, count 0.
  """
  if selection is None:
    return jnp.zeros(())
  used = balance.chosen(selected.expert_idx, selection.shape[-1])
  worst = jnp.where(used, selection, jnp.inf).min(axis=-1)
  other = jnp.where(used, -jnp.inf, selection).max(axis=-1)
  both = jnp.isfinite(worst) & jnp.isfinite(other) & mask
  # Inner where: infinity minus infinity would be a NaN.
  return jnp.where(both, jnp.where(both, worst, 0.0) - jnp.where(both, other, 0.0), 0.0).sum()
