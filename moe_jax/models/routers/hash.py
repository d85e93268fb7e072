"""Hash Layer: a fixed table from token id to experts (Roller et al., arXiv 2106.04426).

No router weights and no gate: every chosen expert counts 1 / K. Each layer has a table of its own.
The random table is drawn with the weights; the balanced one needs the token counts of the training
text, so it is made on the host before the first step. Either is state, saved with the model.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing, tables

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


def host_tables(inputs: routing.HostInputs, cfg: moe_config.MoEConfig) -> dict[str, np.ndarray]:
  """The balanced tables [layers, V, K]; nothing with random ones."""
  if cfg.options.hash_table != 'balanced':
    return {}
  counts, (layers, *_) = inputs.token_counts(), inputs.shapes['table']
  rngs = [np.random.default_rng((inputs.seed, layer)) for layer in range(layers)]
  balanced = [
    tables.balanced_table(counts, cfg.num_experts, cfg.num_experts_per_tok, rng) for rng in rngs
  ]
  return {'table': np.stack(balanced)}


ROUTER = routing.Router(
  route, router_traits.LIBRARY['hash'], init_state=init_state, host_tables=host_tables
)
