"""Replay of recorded assignments: who goes where is read from a file, how much is computed.

Row r of a batch reads row r modulo the recorded rows; place l of a row reads place l. The run loads
the file into the state (`moe_jax/models/routers/tables.py`), which is saved with the model.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import moe_config
from moe_jax.models.routers import routing

Array = jax.Array


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Gates are the present scores of the recorded experts."""
  del train
  recorded = inputs.state['assignments']
  row = inputs.tokens.row[:, None] % cfg.options.replay_rows
  expert_idx = recorded[row, inputs.tokens.places]
  return routing.Routing(
    routing.gates_of(inputs.scores, expert_idx, cfg), expert_idx, inputs.scores
  )


def init_state(cfg: moe_config.MoEConfig, sizes: routing.Sizes, rng: Array) -> dict[str, Array]:
  """[rows, L, K] int32, all E (nowhere) until the run has loaded the file."""
  del rng
  shape = (cfg.options.replay_rows, sizes.max_seq_len, cfg.num_experts_per_tok)
  return {'assignments': jnp.full(shape, cfg.num_experts, jnp.int32)}


ROUTER = routing.Router(route, init_state=init_state)
