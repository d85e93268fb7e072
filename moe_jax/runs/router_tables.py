"""Puts what a router reads from outside into a fresh state: token counts, a recording."""

import functools

import jax
import numpy as np

from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.models import model_variables
from moe_jax.models.routers import ROUTERS, routing
from moe_jax.training import train_state


def with_tables(
  cfg: schema.Config, state: train_state.TrainState, corpus: corpus_lib.Corpus
) -> train_state.TrainState:
  """Returns the state with the router's `host_tables` in it; the same state if there are none.

  Raises:
    errors.InputError: what the router reads does not fit the model.
  """
  make = ROUTERS[cfg.model.moe.router].host_tables if cfg.model.is_moe else None
  if make is None:
    return state
  old = model_variables.moe_state(state.router_state)
  counts = functools.partial(_token_counts, corpus, cfg.model.vocab_size)
  shapes = {name: array.shape for name, array in old.items()}
  made = make(routing.HostInputs(shapes, counts, cfg.train.seed), cfg.model.moe)
  if not made:
    return state
  placed = {name: jax.device_put(made.get(name, a), a.sharding) for name, a in old.items()}
  return state.replace(router_state=model_variables.with_moe_state(cfg.model, placed))


def _token_counts(corpus: corpus_lib.Corpus, vocab_size: int) -> np.ndarray:
  """[V], over the training splits of all domains."""
  counts = (np.bincount(split.tokens, minlength=vocab_size) for split in corpus.train)
  return np.asarray(sum(counts))
