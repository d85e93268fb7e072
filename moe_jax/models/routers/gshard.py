"""GShard's top-2 gate: g1 / (g1 + g2) and g2 / (g1 + g2) (arXiv 2006.16668, Algorithm 1).

Every token reaches both of its experts: capacity and random dispatch of the second one are not
applied, as in DeepSeekMoE's baselines, which drop no token (arXiv 2401.06066).
"""

import jax

from moe_jax import config
from moe_jax.models.routers import routing


def route(logits: jax.Array, cfg: config.MoEConfig) -> routing.Routing:
  """logits [B, L, E] float32 -> Routing with K = 2 gates that sum to 1."""
  scores = jax.nn.softmax(logits, axis=-1)
  gates, expert_idx = routing.keep_best(scores, cfg.num_experts_per_tok)
  return routing.Routing(gates / gates.sum(axis=-1, keepdims=True), expert_idx, scores)
