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

from moe_jax.balance import loss_scopes, router_stats
from moe_jax.config import moe_config, router_traits
from moe_jax.devices import partitioning
from moe_jax.models import exchange, layers
from moe_jax.models.dispatch import DISPATCHES, gather
from moe_jax.models.exchange import buffers as buffers_lib
from moe_jax.models.routers import ROUTERS, capacity, gshard, routing, scoring
from moe_jax.models.routers import state as state_lib

Array = jax.Array


# Collection of what an experiment on a trained model changes, [layers] each: `disabled` int32, how
# many of a token's best experts it may not use; `shared_scale` float32, times the shared experts.
INTERVENTION = 'intervention'

TOKEN_AXES = ('act_batch', 'act_len')
GATE_UP_AXES = ('expert', 'expert_embed', 'gate_up', 'expert_mlp')
DOWN_AXES = ('expert', 'expert_mlp', 'expert_embed')


def drops(cfg: moe_config.MoEConfig, train: bool) -> bool:
  """Whether a limited capacity is enforced: in training, and elsewhere only if asked."""
  return cfg.capacity.policy != 'none' and (train or cfg.capacity.at_eval)


def _dispatch_name(cfg: moe_config.MoEConfig, train: bool, num_choices: int) -> str:
  """Buffers of a fixed size serve where routing bounds them; elsewhere nothing may be lost.

  Outside of training, few choices are served by the weights of their experts alone.
  """
  bounded = drops(cfg, train) or router_traits.of(cfg).bound is not None
  name = cfg.dispatch if cfg.dispatch != 'capacity' or bounded else 'dropless'
  few = not train and num_choices <= gather.STREAMED_CHOICES * cfg.num_experts
  few = few and partitioning.axis_size('expert') == 1
  return 'gather' if name == 'dropless' and few else name


def _room(
  cfg: moe_config.MoEConfig, num_choices: int, local: buffers_lib.Local, num_here: int
) -> int:
  """Choices that a device of an expert-parallel group computes at most; `num_choices` is T K."""
  rows, k = local.expert_idx.shape
  return buffers_lib.rows_for(cfg.exchange.buffer_factor, num_choices, rows * min(k, num_here))


class MoE(nn.Module):
  """Routed experts with stacked kernels, plus the shared experts as one fused FFN."""

  cfg: moe_config.MoEConfig
  sizes: routing.Sizes
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  train: bool

  @nn.compact
  def __call__(
    self, x: Array, tokens: routing.Tokens, layer: Array, slopes: Mapping[str, Any]
  ) -> tuple[Array, router_stats.RouterStats | None]:
    """Applies the layer.

    Args:
      x: [B, L, D].
      tokens: the batch as routing sees it.
      layer: [] int32, number of the layer.
      slopes: see `loss_scopes.layer_losses`.

    Returns:
      ([B, L, D], the books; None while parameters are made, when nothing is routed).
    """
    cfg, router = self.cfg, ROUTERS[self.cfg.router]
    # The experts' weights are made first: their random numbers do not depend on the router.
    laid_out = self.get_variable('kernels', 'kernels')  # by `cached_model.unstack`
    kernels = (laid_out,) if laid_out else self._expert_kernels(x.shape[-1])
    kernel = self._router_kernel(x.shape[-1]) if router.traits.has_logits else None
    state = self._router_state(router)
    shared = self._shared(x)
    if self.is_initializing():
      return shared, None
    if self.has_variable(INTERVENTION, INTERVENTION):  # by `analysis.interventions`
      intervention = self.get_variable(INTERVENTION, INTERVENTION)
      state |= {'disabled': intervention['disabled']}
      shared *= intervention['shared_scale'].astype(shared.dtype)
    with jax.named_scope('router'):
      logits = None if kernel is None else self._logits(x, kernel, tokens, layer)
      selected, selection = self._select(router, logits, tokens, layer, state)
      kept = self._drop(selected, tokens, layer)
    self.sow('intermediates', 'gates', selected.gates)
    self.sow('intermediates', 'expert_idx', selected.expert_idx)
    self.sow('intermediates', 'scores', selected.scores)
    routed = partitioning.per_shard(
      functools.partial(self._experts, x.shape[:2]),
      (*[TOKEN_AXES] * 3, *((None,) if laid_out else (GATE_UP_AXES, DOWN_AXES))),
      (TOKEN_AXES, TOKEN_AXES),
    )
    # The shared experts wait for nobody: they are computed while tokens travel.
    out, overflow = routed(x, kept.gates, kept.expert_idx, *kernels)
    out += shared
    with jax.named_scope('books'):
      books = _books(cfg, selected, kept, logits, selection, tokens, slopes)
      return out, books.replace(overflow=overflow.sum(dtype=jnp.int32))

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

    def decide(logits, ids, mask, place, row, seed, layer, state):
      tokens = routing.Tokens(ids, mask, row, seed, place)
      scores = selection = None
      if logits is not None:
        scores = scoring.SCORE_FUNCS[self.cfg.score_func](logits)
        selection = scoring.selection(scores, state, self.cfg)
      inputs = routing.Inputs(scores, selection, tokens, layer, state)
      return routing.without(router.route(inputs, self.cfg, self.train), tokens.mask), selection

    # XLA would gather the scores of all devices for the top-k.
    per_token = (logits, tokens.ids, tokens.mask, tokens.place)
    others = (tokens.row, tokens.seed, layer, state)
    if router.across_rows:
      return decide(*per_token, *others)
    axes = TOKEN_AXES if router.per_token else TOKEN_AXES[:1]
    in_axes = (*[axes] * len(per_token), TOKEN_AXES[:1], None, None, None)
    return partitioning.per_shard(decide, in_axes, axes)(*per_token, *others)

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
    self, whole: tuple[int, int], x: Array, gates: Array, expert_idx: Array, *kernels: Any
  ) -> tuple[Array, Array]:
    """What a device does with its part of x; `whole` is (B, L) of the forward pass.

    Args:
      whole: rows and tokens per row of the forward pass, on all devices together.
      x: [B, L, D] here.
      gates: [B, L, K].
      expert_idx: [B, L, K].
      *kernels: this device's part of gate_up and down, or what `cached_model.unstack` made of them.

    Returns:
      (each token's gated sum [B, L, D]; [1, 1] int32, choices that did not fit a buffer).
    """
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, gates, expert_idx)]
    overflow = jnp.int32(0)
    if len(kernels) == 1:  # laid out
      out = gather.apply(*flat, *kernels)
    else:
      # Flat while it travels: a TPU would pad an axis of 2, and copy what it has gathered.
      gate_up = kernels[0].reshape(*kernels[0].shape[:2], -1)
      gate_up = partitioning.gather_shards(gate_up, GATE_UP_AXES.index('expert_embed'))
      gate_up = gate_up.reshape(*gate_up.shape[:2], *kernels[0].shape[2:])
      down = partitioning.gather_shards(kernels[1], DOWN_AXES.index('expert_embed'))
      out, overflow = self._travel(whole, x.shape, flat, gate_up, down)
      if partitioning.axis_size('tensor') > 1:
        out = jax.lax.psum(out, 'tensor')  # each device had a part of every expert's width
    return out.reshape(x.shape), overflow.reshape(1, 1)

  def _travel(
    self,
    whole: tuple[int, int],
    here: tuple[int, ...],
    flat: list[Array],
    gate_up: Array,
    down: Array,
  ) -> tuple[Array, Array]:
    """Brings tokens to the experts and back; (gated sums [T, D], choices without room)."""
    cfg, ways = self.cfg, partitioning.axis_size('expert')
    name = _dispatch_name(cfg, self.train, flat[2].size)
    # An exchange's group holds neighbouring rows. Rows may be cut along their length.
    slots = lambda rows: min(rows * here[1], capacity.slots(cfg, rows, whole[1], whole[0]))
    buffers = name == 'capacity'
    if ways == 1:
      room = slots(here[0]) if buffers else 0
      return DISPATCHES[name](*flat, gate_up, down, cfg.grouped_matmul, room), jnp.int32(0)
    most, num_here = len(flat[0]), len(gate_up)
    if buffers:
      most = min(most, num_here * slots(here[0]))

    def compute(local: buffers_lib.Local) -> tuple[Array, Array]:
      room = slots(ways * here[0]) if buffers else _room(cfg, flat[2].size, local, num_here)
      out = DISPATCHES[name](*local, gate_up, down, cfg.grouped_matmul, room)
      if name != 'dropless':
        return out, jnp.int32(0)
      chosen = (local.expert_idx < num_here).sum(dtype=jnp.int32)
      return out, jnp.maximum(chosen - room, 0)

    return exchange.EXCHANGES[exchange.choose(cfg.exchange.kind)](compute, cfg, *flat, most)

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
