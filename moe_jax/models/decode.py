"""One step of cached decoding: a few tokens per row, every layer by itself.

Training scans over stacked layers; here each layer has its own weights and its own cache, so that a
step copies neither: a scan would cut the weights out of the stacks and write every cache anew for
each token. The mathematics is that of `transformer.Block`, which both apply.

Slot i of a cache belongs to position i of its row, and a row is one document.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import config
from moe_jax.models import attention, layers, transformer
from moe_jax.models.routers import routing

Array = jax.Array
Caches = tuple[transformer.LayerCache, ...]  # one per layer, arrays [B, S, ...]


@struct.dataclass
class Weights:
  """A model's variables, layer by layer."""

  embedding: Array  # [V, D]
  layers: tuple[dict[str, Any], ...]  # variables of one `transformer.Block` each
  final_norm: dict[str, Array]
  head: Array  # [D, V]


class Decoded(NamedTuple):
  """What a step returns."""

  logits: Array  # [B, L, V] float32
  hidden: Array  # [B, L, D], before the final norm
  caches: Caches


def unstack(cfg: config.ModelConfig, variables: Mapping[str, Any]) -> Weights:
  """Takes the stacks of layers apart; copies every weight once."""
  params, state = variables['params'], variables.get('router_state', {})
  found = []
  for kind in transformer.stacks(cfg):
    own = {'params': params[kind.name], 'router_state': state.get(kind.name, {})}
    found += [jax.tree.map(lambda a: a[i], own) for i in range(kind.length)]  # noqa: B023
  return Weights(params['embedding'], tuple(found), params['final_norm'], params['head'])


def unstack_caches(
  cfg: config.ModelConfig, caches: Mapping[str, transformer.LayerCache], num_slots: int
) -> Caches:
  """The caches of a prefill, leaves [layers, B, L, ...], one by one and with room for more.

  Args:
    cfg: the model.
    caches: `transformer.Output.caches`.
    num_slots: S, slots per row, at least L.
  """

  def padded(a: Array) -> Array:
    return jnp.pad(a, [(0, 0), (0, num_slots - a.shape[1])] + [(0, 0)] * (a.ndim - 2))

  found = []
  for kind in transformer.stacks(cfg):
    for i in range(kind.length):
      found.append(jax.tree.map(lambda a: padded(a[i]), caches[kind.name]))  # noqa: B023
  return tuple(found)


def step(
  cfg: config.ModelConfig, weights: Weights, tokens: Array, positions: Array, caches: Caches
) -> Decoded:
  """Applies the model to the next tokens of every row.

  Args:
    cfg: the model.
    weights: see `unstack`.
    tokens: [B, L] int32.
    positions: [B, L] int32, rising by one along a row; slots before the first are written.
    caches: of the tokens before; slots from `positions` on may hold anything.

  Returns:
    Decoded; its caches hold the new tokens at their positions.
  """
  dtype = jnp.dtype(cfg.dtype)
  x = jnp.take(weights.embedding, tokens, axis=0).astype(dtype)
  ones = jnp.ones_like(tokens)
  ctx = attention.Context(positions, ones)
  row = jnp.arange(len(tokens), dtype=jnp.int32)
  routed = routing.Tokens(tokens, ones > 0, row, jnp.uint32(0), positions)
  new = []
  kinds = [kind for kind in transformer.stacks(cfg) for _ in range(kind.length)]
  for number, (kind, own, cache) in enumerate(zip(kinds, weights.layers, caches, strict=True)):
    inputs = transformer.LayerInputs(cache, jnp.int32(number), {})
    block = transformer.Block(cfg, kind.is_moe, train=False)
    x, (cache, _) = block.apply(own, x, inputs, ctx, routed)
    new.append(cache)
  norm = layers.RMSNorm(cfg.norm_eps, dtype)
  logits = transformer.logits_of(norm.apply({'params': weights.final_norm}, x), weights.head)
  return Decoded(logits, x, tuple(new))
