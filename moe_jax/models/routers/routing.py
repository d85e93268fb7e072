"""What every router returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array


class Routing(NamedTuple):
  """The decision of a router for every token of a batch.

  `expert_idx` of a token that must not be routed (padding) is E, one past the last expert: every
  dispatch leaves it out and no load counts it.
  """

  gates: Array  # [B, L, K] float32, weight of each chosen expert's output
  expert_idx: Array  # [B, L, K] int32, the chosen experts, all different
  scores: Array  # [B, L, E] float32, affinities that the balance losses average


def keep_best(scores: Array, k: int) -> tuple[Array, Array]:
  """The K best experts of every token: scores [B, L, E] -> (their scores, their ids), [B, L, K].

  The ids are saved by every remat policy (name 'routing') and decide the gather of both passes: a
  top-k recomputed under different rounding could send gradients to experts that never ran.
  """
  _, expert_idx = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
  expert_idx = checkpoint_name(expert_idx, 'routing')
  return jnp.take_along_axis(scores, expert_idx, axis=-1), expert_idx


def without(routing: Routing, mask: Array) -> Routing:
  """Takes the tokens with mask [B, L] False out of the routing: gates 0, expert E."""
  keep = mask[..., None]
  num_experts = routing.scores.shape[-1]
  return Routing(
    jnp.where(keep, routing.gates, 0.0),
    jnp.where(keep, routing.expert_idx, num_experts),
    jnp.where(keep, routing.scores, 0.0),
  )
