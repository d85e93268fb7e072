"""Switch Transformer's top-1 gate: the winner's raw probability (arXiv 2101.03961, Eq. 1-2).

The raw probability keeps a gradient to the router; a renormalised single gate would be the constant
1.
"""

import jax

from moe_jax import config
from moe_jax.models.routers import routing


def route(logits: jax.Array, cfg: config.MoEConfig) -> routing.Routing:
  """logits [B, L, E] float32 -> Routing with K = 1 gate."""
  scores = jax.nn.softmax(logits, axis=-1)
  gates, expert_idx = routing.keep_best(scores, cfg.num_experts_per_tok)
  return routing.Routing(gates, expert_idx, scores)
