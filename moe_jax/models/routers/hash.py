"""Hash Layer: a fixed table from token id to experts (Roller et al., arXiv 2106.04426).

No router weights and no gate: every chosen expert counts 1 / K. Each layer has a table of its own.
The random table is drawn here; the balanced one needs token counts, so the run fills it in
(`moe_jax/models/routers/tables.py`). Either is state, saved with the model.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import moe_config
from moe_jax.models.routers import routing

Array = jax.Array


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """The scores are the gates, spread over all experts: 1 / K for the table's, 0 for the others."""
  del train
  k = cfg.num_experts_per_tok
  expert_idx = inputs.state['table'][inputs.tokens.ids]
  scores = jax.nn.one_hot(expert_idx, cfg.num_experts).sum(axis=-2) / k
  gates = jnp.full(expert_idx.shape, cfg.routed_scaling_factor / k, jnp.float32)
  return routing.Routing(gates, expert_idx, scores)


def init_state(cfg: moe_config.MoEConfig, sizes: routing.Sizes, rng: Array) -> dict[str, Array]:
  """A random table [V, K]: K different experts per token id, all equally likely."""
  noise = jax.random.uniform(rng, (sizes.vocab_size, cfg.num_experts))
  table = jnp.argsort(noise, axis=-1)[:, : cfg.num_experts_per_tok]
  return {'table': table.astype(jnp.int32)}


ROUTER = routing.Router(route, has_logits=False, init_state=init_state)
