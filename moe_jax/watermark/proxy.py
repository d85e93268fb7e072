"""The small model that divides the vocabulary evenly; reader and writer use it.

It reads a few tokens and nothing before them, so that a reader needs no prompt. Whatever dtype its
run has, it is computed in float32: half of the mass is a sharp border.

Axis letters: W tokens before.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.inference import cached_model
from moe_jax.inference import generate as generate_lib

Array = jax.Array


class Proxy(NamedTuple):
  """A model with its weights, laid out as decoding multiplies with them."""

  cfg: schema.ModelConfig
  weights: cached_model.Weights


def of(cfg: schema.ModelConfig, variables: trees.Variables) -> Proxy:
  """The proxy that a model is.

  Raises:
    errors.InputError: its router is not causal.
  """
  generate_lib.check_router(cfg)
  cfg = dataclasses.replace(cfg, dtype='float32')
  return Proxy(cfg, cached_model.unstack(cfg, variables))


def next_probs(cfg: schema.ModelConfig, weights: cached_model.Weights, before: Array) -> Array:
  """Probabilities [B, V] float32 of the token behind the ids [B, W]."""
  rows, width = before.shape
  full = jnp.full((rows,), width, jnp.int32)
  hidden = cached_model.prefill(cfg, weights, before, full, width).hidden
  return jax.nn.softmax(cached_model.logits_of(cfg, weights, hidden[:, -1:])[:, 0], axis=-1)
