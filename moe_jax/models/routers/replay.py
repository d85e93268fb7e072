"""Replay of recorded assignments: who goes where is read from a file, how much is computed.

Row r of a batch reads row r modulo the recorded rows; place l of a row reads place l. The file is
read into the state before the first step, and saved with the model.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing, tables

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


def host_tables(inputs: routing.HostInputs, cfg: moe_config.MoEConfig) -> dict[str, np.ndarray]:
  """The recorded assignments [layers, rows, L, K].

  Raises:
    errors.InputError: the recording does not fit the model.
  """
  return {'assignments': tables.load_assignments(cfg, inputs.shapes['assignments'])}


ROUTER = routing.Router(
  route, router_traits.LIBRARY['replay'], init_state=init_state, host_tables=host_tables
)
