"""A router that ignores what it reads: tokens are dealt to experts in turn. For benchmarks.

Gates are the scores of the experts dealt, so that forward and backward cost what they cost.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing

Array = jax.Array


def deal(tokens: routing.Tokens, k: int, num_experts: int) -> Array:
  """[B, L, K] int32: the next K of `num_experts` experts for every token of the batch in turn."""
  length = tokens.ids.shape[1]
  number = tokens.row[:, None] * length + tokens.places
  return (number[..., None] * k + jnp.arange(k)) % num_experts


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Every expert gets the same number of tokens, up to one, of a batch without padding."""
  del train
  expert_idx = deal(inputs.tokens, cfg.num_experts_per_tok, cfg.num_experts)
  gates = routing.gates_of(inputs.scores, expert_idx, cfg)
  return routing.Routing(gates, expert_idx, inputs.scores)


ROUTER = routing.Router(route, router_traits.LIBRARY['balanced'])
