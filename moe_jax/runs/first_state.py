"""The state that a run starts from: random weights, or those of another run."""

from typing import Any

import jax

from moe_jax import trees
from moe_jax.config import parse, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.runs import router_tables, trained_run, warm_start
from moe_jax.storage import fetch
from moe_jax.training import train_state


def source_meta(cfg: schema.Config) -> dict[str, Any] | None:
  """The `meta` of the checkpoint whose weights the run starts from; None for random ones."""
  return trained_run.read_meta(cfg.init_from, flag='config.init_from') if cfg.init_from else None


def random(
  cfg: schema.Config, mesh: jax.sharding.Mesh, corpus: corpus_lib.Corpus
) -> train_state.TrainState:
  """The state at step 0 with random weights, and with what its router reads from outside."""
  return router_tables.with_tables(cfg, train_state.init_state(cfg, mesh), corpus)


def make(
  cfg: schema.Config,
  source: trees.Json | None,
  mesh: jax.sharding.Mesh,
  corpus: corpus_lib.Corpus,
  say: trained_run.Say,
) -> train_state.TrainState:
  """The state at step 0: random weights, or those of `init_from`, whose `meta` is `source`."""
  if source is None:
    return random(cfg, mesh, corpus)
  with trained_run.reader(fetch.local(cfg.init_from)) as checkpointer:
    found = warm_start.read(cfg, parse.from_record(source['config']), mesh, checkpointer, say)
  state = router_tables.with_tables(cfg, train_state.state_from(cfg, mesh, found['params']), corpus)
  return state.replace(router_state=warm_start.merge(state.router_state, found['router_state']))
