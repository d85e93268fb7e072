"""DS-MoE: dense training, sparse inference (arXiv 2404.05567, sections 2-3).

Training weighs every expert with its softmax score; outside of training `options.inference` says
which experts stay: all of them, those with E * score above a threshold, the best K, or those above
the threshold at which K experts per token stay on average over the batch. Gates are not
renormalised. That last rule, 'threshold_topk', is a budget of the tokens that are read together, so
what is decoded one token at a time is not what a text read whole gives, nor what other rows give.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing

Array = jax.Array


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Returns one column per expert, in their order; those not in use are E."""
  scores, e = inputs.scores, cfg.num_experts
  frozen = jax.lax.stop_gradient(scores)
  active = jnp.ones(scores.shape, bool)
  rule = 'all' if train else cfg.options.inference
  if rule == 'threshold':
    active = e * frozen > cfg.options.inference_threshold
  elif rule == 'topk':
    rank = jnp.argsort(jnp.argsort(-frozen, axis=-1), axis=-1)
    active = rank < cfg.num_experts_per_tok
  elif rule == 'threshold_topk':
    active = frozen >= _batch_threshold(frozen, inputs.tokens.mask, cfg.num_experts_per_tok)
  expert_idx = checkpoint_name(jnp.where(active, jnp.arange(e), e).astype(jnp.int32), 'routing')
  return routing.Routing(routing.gates_of(scores, expert_idx, cfg), expert_idx, scores)


def _batch_threshold(scores: Array, mask: Array, k: int) -> Array:
  """[] the score that exactly K times the real tokens of a batch reach (more only in a tie)."""
  ranked = jnp.sort(jnp.where(mask[..., None], scores, -1.0).reshape(-1))[::-1]
  last = jnp.maximum(mask.sum() * k - 1, 0)
  return ranked[last]


ROUTER = routing.Router(route, router_traits.LIBRARY['ds_moe'], across_rows=True)
