"""A router that ignores what it reads and overloads expert 0. For benchmarks.

Gates are the scores of the experts dealt, as with router 'balanced'.
"""

import jax.numpy as jnp

from moe_jax import integer_hash
from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import balanced, routing


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Expert 0 is the first choice of `options.skew` of the tokens; the others are dealt in turn."""
  del train
  noise = integer_hash.uniform(routing.token_noise(inputs.tokens, inputs.layer, salt=4))
  dealt = 1 + balanced.deal(inputs.tokens, cfg.num_experts_per_tok, cfg.num_experts - 1)
  first = jnp.where(noise < cfg.options.skew, 0, dealt[..., 0])
  expert_idx = dealt.at[..., 0].set(first)
  gates = routing.gates_of(inputs.scores, expert_idx, cfg)
  return routing.Routing(gates, expert_idx, inputs.scores)


ROUTER = routing.Router(route, router_traits.LIBRARY['skewed'])
