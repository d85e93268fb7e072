"""Sinkhorn routing (S-BASE, arXiv 2202.01169): balanced in training, plain top-K elsewhere.

The scores of a row's tokens are scaled in turn to give every expert, then every token, equal weight
(Sinkhorn's iteration, section 2.1 and appendix B); experts are chosen by the result, gates stay the
scores. Choices see later tokens of the row, in training only. The paper lets the whole batch
compete; a row keeps the choices free of micro-batches and devices.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing

Array = jax.Array

ITERATIONS = 8  # loads are then within a few percent of each other; the paper iterates to 1e-2


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Chooses by balanced scores in training, by `selection` elsewhere; weighs by `scores`."""
  chosen_by = balanced_scores(inputs.scores, inputs.tokens.mask) if train else inputs.selection
  expert_idx = routing.keep_best(chosen_by, cfg.num_experts_per_tok)
  gates = routing.gates_of(inputs.scores, expert_idx, cfg)
  return routing.Routing(gates, expert_idx, inputs.scores)


def balanced_scores(scores: Array, mask: Array) -> Array:
  """[B, L, E] positive scores, mask [B, L] -> [B, L, E] whose experts weigh alike in every row."""
  found = jnp.where(mask[..., None], jax.lax.stop_gradient(scores), 0.0)
  for _ in range(ITERATIONS):
    found /= jnp.maximum(found.sum(axis=1, keepdims=True), 1e-20)
    found /= jnp.maximum(found.sum(axis=2, keepdims=True), 1e-20)
  return found


ROUTER = routing.Router(route, router_traits.LIBRARY['sinkhorn'])
