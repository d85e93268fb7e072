"""A model run on prompts with its attention observed and changed, layer by layer.

Axis letters: X layers of the model, the dense ones first.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.models import decoder_block, transformer
from moe_jax.models.attention import observed

Array = jax.Array
TYPES = decoder_block.LayerTypes(attention=observed.Attention, latent_attention=observed.MLA)


class Observed(NamedTuple):
  """One application of a model; what is not used is not computed under `jit`."""

  logits: Array  # [B, L, V] float32
  probs: Array  # [X, B, N, L, S] float32, before any factors
  queries: Array  # [X, B, L, N, H], rotated
  keys: Array  # [X, B, L, Nkv, H], rotated; with MLA those of the expanded form, Nkv = N
  expert_idx: Array | None  # [MoE layers, B, L, K] int32; None for a dense model


def apply(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  tokens: Array,
  mask: Array,
  control: Mapping[str, Array] | None = None,
) -> Observed:
  """Runs a model on prompts, a row each.

  Args:
    cfg: the model.
    variables: params and router_state.
    tokens: [B, L] int32.
    mask: [B, L] bool, False = padding, which is on the right.
    control: what `observed` has of a layer, leaves [X, ...]: `factors`, `hidden`.

  Returns:
    Observed.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  variables = {**variables, **_by_stack(cfg, control or {})}
  model = transformer.Transformer(cfg, types=TYPES)
  out, sown = model.apply(
    variables, tokens, positions, mask.astype(jnp.int32), mutable=['intermediates']
  )
  kinds, found = decoder_block.stacks(cfg), cast(dict[str, Any], sown['intermediates'])

  def stacked(name: str) -> Array:
    parts: list[Array] = [found[kind.name]['attention'][name][0] for kind in kinds]
    return jnp.concatenate(parts)

  experts = found['moe_layers']['moe']['expert_idx'][0] if cfg.num_moe_layers else None
  logits = cast(transformer.Output, out).logits
  probs, queries, keys = map(stacked, (observed.PROBS, observed.QUERIES, observed.KEYS))
  return Observed(logits, probs, queries, keys, experts)


def _by_stack(cfg: schema.ModelConfig, control: Mapping[str, Array]) -> dict[str, Any]:
  """The variable collection of a control over all layers; {} for none."""
  if not control:
    return {}
  stacks = {}
  for kind in decoder_block.stacks(cfg):
    here = slice(kind.first, kind.first + kind.length)
    own = {name: leaf[here] for name, leaf in control.items()}
    stacks[kind.name] = {'attention': {observed.CONTROL: own}}
  return {observed.CONTROL: stacks}
