"""DeepSeekMoE's router: softmax over routed experts, best K (arXiv 2401.06066, Eq. 9-11)."""

import jax

from moe_jax import config
from moe_jax.models.routers import routing


def route(logits: jax.Array, cfg: config.MoEConfig) -> routing.Routing:
  """logits [B, L, E] float32 -> Routing.

  The gate is the raw probability; with `norm_topk_prob` the K gates are divided by their sum.
  """
  scores = jax.nn.softmax(logits, axis=-1)
  gates, expert_idx = routing.keep_best(scores, cfg.num_experts_per_tok)
  if cfg.norm_topk_prob:
    gates /= gates.sum(axis=-1, keepdims=True)
  return routing.Routing(gates, expert_idx, scores)
