"""DeepSeekMoE's feed-forward layer: shared experts + routed experts (arXiv 2401.06066, section 3).

h_t = u_t + shared(u_t) + sum over the K chosen experts of gate * expert(u_t); the residual u_t is
added by the block. Here the layer only wires three rooms together: a router decides, a dispatch
moves the tokens, `balance` keeps the books.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from moe_jax import balance, config, partitioning
from moe_jax.models import layers
from moe_jax.models.dispatch import DISPATCHES
from moe_jax.models.routers import ROUTERS, routing

Array = jax.Array


@struct.dataclass
class RouterStats:
  """The books of one MoE layer for one batch; stacked over layers as [layers, ...] by the model.

  Sums over real tokens, so that micro-batches and devices add up; padding is in none of them.
  """

  load: Array  # [E] int32, tokens that each expert received; sums to real tokens * K
  load_balance_loss: (
    Array  # [] float32, sum over sequences of tokens * expert-level loss, unweighted
  )


def _routed(
  cfg: config.MoEConfig, x: Array, gates: Array, expert_idx: Array, gate_up: Array, down: Array
) -> Array:
  """x [B, L, D], gates and expert_idx [B, L, K] -> gated sum of each token's experts [B, L, D]."""
  flat = [a.reshape(-1, a.shape[-1]) for a in (x, gates, expert_idx)]
  out = DISPATCHES[cfg.dispatch](*flat, gate_up, down, cfg.grouped_matmul)
  return out.reshape(x.shape)


class MoE(nn.Module):
  """Routed experts with stacked kernels, plus the shared experts as one fused FFN."""

  cfg: config.MoEConfig
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> tuple[Array, RouterStats]:
    """x [B, L, D], mask [B, L] bool (False = padding) -> ([B, L, D], RouterStats)."""
    cfg = self.cfg
    with jax.named_scope('router'):
      decision = self._route(x, mask)
    routed = self._per_device(functools.partial(_routed, cfg), num_batch_args=3)
    out = routed(x, decision.gates, decision.expert_idx, *self._expert_kernels(x.shape[-1]))
    if cfg.num_shared_experts:
      with jax.named_scope('shared'):
        width = cfg.num_shared_experts * cfg.moe_mlp_dim
        out += layers.FeedForward(
          width, self.init_std, self.dtype, self.param_dtype, name='shared'
        )(x)
    return out, self._stats(decision, mask)

  def _route(self, x: Array, mask: Array) -> routing.Routing:
    """Scores in float32 whatever the compute dtype: rounding the logits would reorder experts."""
    cfg = self.cfg
    init = layers.init_weight(self.init_std, 'embed', 'expert')
    kernel = self.param('router', init, (x.shape[-1], cfg.num_experts), jnp.float32)
    logits = jnp.einsum(
      'BLD,DE->BLE', x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST
    )
    # XLA would gather the scores of all devices for the top-k.
    decision = self._per_device(lambda a: ROUTERS[cfg.router](a, cfg), 1)(logits)
    return routing.without(decision, mask)

  def _per_device(self, fn: Callable, num_batch_args: int) -> Callable:
    """Runs `fn` on each device's own rows; not at init, whose single token no mesh can split."""
    if self.is_initializing():
      return fn
    return partitioning.over_batch_shards(fn, num_batch_args)

  def _expert_kernels(self, d: int) -> tuple[Array, Array]:
    """gate_up [E, D, 2, F] and down [E, F, D] in the compute dtype."""
    e, f = self.cfg.num_experts, self.cfg.moe_mlp_dim
    gate_up_init = layers.init_weight(self.init_std, 'expert', 'embed', 'gate_up', 'expert_mlp')
    gate_up = self.param('gate_up', gate_up_init, (e, d, 2, f), self.param_dtype)
    down_init = layers.init_weight(self.init_std, 'expert', 'expert_mlp', 'embed')
    down = self.param('down', down_init, (e, f, d), self.param_dtype)
    return gate_up.astype(self.dtype), down.astype(self.dtype)

  def _stats(self, decision: routing.Routing, mask: Array) -> RouterStats:
    cfg = self.cfg
    load = balance.expert_load(decision.expert_idx, cfg.num_experts)
    num_tokens = mask.sum(axis=1, dtype=jnp.int32)
    loss = balance.expert_level_loss(decision.scores, load, num_tokens, cfg.num_experts_per_tok)
    return RouterStats(load.sum(axis=0, dtype=jnp.int32), jnp.sum(loss * num_tokens))
