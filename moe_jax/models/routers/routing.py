"""What every router sees and returns, and the steps that routers share.

A router is one function `route(inputs, cfg, train) -> Routing`. It is handed the scores of all
experts and, apart from them, the selection scores (scores moved by the expert bias, groups out of
reach at -inf): the first decide how much an expert counts, the second who is chosen.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax import integer_hash
from moe_jax.config import moe_config, router_traits

Array = jax.Array


class Tokens(NamedTuple):
  """The batch as routing sees it; the same for every layer."""

  ids: Array  # [B, L] int32, token ids
  mask: Array  # [B, L] bool, False = padding
  row: Array  # [B] int32, number of the row in the whole batch of the optimizer step
  seed: Array  # [] uint32, changes with the step; what decides all random choices
  place: Array | None = None  # [B, L] int32, place of each token in its row; None counts from 0

  @property
  def places(self) -> Array:
    """[B, L] int32; [1, L] if all rows count from 0."""
    return jnp.arange(self.ids.shape[1])[None] if self.place is None else self.place


class Inputs(NamedTuple):
  """What a router decides by."""

  # Both are None, and not to be asked for, with a router without logits (traits.has_logits).
  scores: Array  # [B, L, E] float32
  selection: Array  # [B, L, E] float32, scores plus bias, -inf where out of reach
  tokens: Tokens
  layer: Array  # [] int32, number of the layer in the model
  state: Mapping[str, Array]  # the layer's variables of collection `router_state`


class Routing(NamedTuple):
  """The decision of a router for every token of a batch.

  `expert_idx` of a token that must not be routed (padding), and of a choice that is not used, is E,
  one past the last expert: every dispatch leaves it out and no load counts it. The first entry is
  the best choice.
  """

  gates: Array  # [B, L, K] float32, weight of each chosen expert's output
  expert_idx: Array  # [B, L, K] int32, the chosen experts, all different
  scores: Array  # [B, L, E] float32, affinities that the balance losses average


class Sizes(NamedTuple):
  """What the shapes of a router's state may depend on besides `MoEConfig`."""

  vocab_size: int
  max_seq_len: int


class HostInputs(NamedTuple):
  """What a run can give the state of its routers before the first step."""

  shapes: Mapping[str, tuple[int, ...]]  # of the state's arrays, [layers, ...]
  token_counts: Callable[[], np.ndarray]  # [V] occurrences of each id in the training text
  seed: int  # of the run


class Router(NamedTuple):
  """How a router computes, beside what is asked of it elsewhere, its traits.

  `route` runs on each device's own rows; with `per_token` on its own part of them, where
  `Tokens.place` has no meaning; with `across_rows` on the whole batch.
  """

  route: Callable[[Inputs, moe_config.MoEConfig, bool], Routing]
  traits: router_traits.RouterTraits
  across_rows: bool = False
  per_token: bool = False
  init_state: Callable[[moe_config.MoEConfig, Sizes, Array], dict[str, Any]] | None = None
  # Arrays of the state that are made on the host, [layers, ...]; the others stay as they are.
  host_tables: Callable[[HostInputs, moe_config.MoEConfig], dict[str, np.ndarray]] | None = None


def keep_best(scores: Array, k: int) -> Array:
  """The ids of the K best experts of every token: scores [B, L, E] -> [B, L, K] int32.

  The ids are saved by every remat policy (name 'routing') and decide the gather of both passes: a
  top-k recomputed under different rounding could send gradients to experts that never ran.
  """
  _, expert_idx = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
  return checkpoint_name(expert_idx, 'routing')


def gates_of(scores: Array, expert_idx: Array, cfg: moe_config.MoEConfig) -> Array:
  """Gates [B, L, K] of the chosen experts: their own scores, normalised and scaled if asked.

  A choice E (not used) has gate 0. The bias has no part in it.
  """
  used = expert_idx < scores.shape[-1]
  index = jnp.minimum(expert_idx, scores.shape[-1] - 1)
  gates = jnp.where(used, jnp.take_along_axis(scores, index, axis=-1), 0.0)
  if cfg.norm_topk_prob:
    gates /= jnp.maximum(gates.sum(axis=-1, keepdims=True), 1e-20)
  return gates * cfg.routed_scaling_factor


def without(routing: Routing, mask: Array) -> Routing:
  """Takes the tokens with mask [B, L] False out of the routing: gates 0, expert E."""
  keep = mask[..., None]
  num_experts = routing.scores.shape[-1]
  return Routing(
    jnp.where(keep, routing.gates, 0.0),
    jnp.where(keep, routing.expert_idx, num_experts),
    jnp.where(keep, routing.scores, 0.0),
  )


def without_choices(routing: Routing, keep: Array) -> Routing:
  """Takes single choices, keep [B, L, K] False, out of the routing; the scores stay."""
  num_experts = routing.scores.shape[-1]
  return routing._replace(
    gates=jnp.where(keep, routing.gates, 0.0),
    expert_idx=jnp.where(keep, routing.expert_idx, num_experts),
  )


def token_noise(tokens: Tokens, layer: Array, salt: int) -> Array:
  """[B, L] uint32, one random number per (seed, layer, row, place in the row, salt).

  A pure function of these: micro-batches, devices, remat and scans see the same numbers.
  """
  return integer_hash.combine(tokens.seed, layer, salt, tokens.row[:, None], tokens.places)
