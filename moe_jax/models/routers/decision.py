"""From a layer's input to a router's decision: logits, selection, and what is dropped of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import moe_config
from moe_jax.devices import partitioning
from moe_jax.models import layers
from moe_jax.models.routers import capacity, gshard, routing, scoring

Array = jax.Array


def drops(cfg: moe_config.MoEConfig, train: bool) -> bool:
  """Whether a limited capacity is enforced: in training, and elsewhere only if asked."""
  return cfg.capacity.policy != 'none' and (train or cfg.capacity.at_eval)


def logits_of(
  cfg: moe_config.MoEConfig,
  train: bool,
  x: Array,
  kernel: Array,
  tokens: routing.Tokens,
  layer: Array,
) -> Array:
  """Router logits [B, L, E] in float32 whatever the compute dtype: rounding would reorder experts.

  Args:
    cfg: jitter and normalisation.
    train: whether the input is jittered.
    x: [B, L, D].
    kernel: [D, E].
    tokens: the batch, which decides the jitter.
    layer: [] int32, number of the layer.
  """
  options, x = cfg.options, x.astype(jnp.float32)
  if train and options.input_jitter:
    x = scoring.jitter(x, tokens, layer, options.input_jitter)
  logits = jnp.einsum('BLD,DE->BLE', x, kernel, precision=jax.lax.Precision.HIGHEST)
  if options.logit_norm_scale:
    logits = scoring.normalise_logits(logits, options.logit_norm_scale)
  return logits


def select(
  cfg: moe_config.MoEConfig,
  router: routing.Router,
  train: bool,
  logits: Array | None,
  tokens: routing.Tokens,
  layer: Array,
  state: Mapping[str, Array],
) -> tuple[routing.Routing, Array | None]:
  """The router's decision for the real tokens, and the selection scores [B, L, E].

  Args:
    cfg: how logits become scores.
    router: who decides.
    train: as the router is told.
    logits: [B, L, E] float32; None for a router without.
    tokens: the batch.
    layer: [] int32, number of the layer.
    state: the layer's variables of collection `router_state`.
  """

  def decide(logits, ids, mask, place, row, seed, layer, state):
    tokens = routing.Tokens(ids, mask, row, seed, place)
    scores: Any = None
    selection: Any = None
    if logits is not None:
      scores = scoring.SCORE_FUNCS[cfg.score_func](logits)
      selection = scoring.selection(scores, state, cfg)
    inputs = routing.Inputs(scores, selection, tokens, layer, state)
    return routing.without(router.route(inputs, cfg, train), tokens.mask), selection

  # XLA would gather the scores of all devices for the top-k.
  per_token = (logits, tokens.ids, tokens.mask, tokens.place)
  others = (tokens.row, tokens.seed, layer, state)
  if router.across_rows:
    return decide(*per_token, *others)
  rows = layers.TOKEN_AXES[:1]
  axes = layers.TOKEN_AXES if router.per_token else rows
  in_axes = (*[axes] * len(per_token), rows, None, None, None)
  return partitioning.per_shard(decide, in_axes, axes)(*per_token, *others)


def replayed(
  cfg: moe_config.MoEConfig, selected: routing.Routing, experts: Array, tokens: routing.Tokens
) -> routing.Routing:
  """A decision with recorded choices in place of the router's, gates computed anew in full.

  The gates are the present scores of the recorded experts, so their gradient reaches the router.

  Args:
    cfg: how gates are normalised.
    selected: the router's own decision, whose scores are used.
    experts: [B, L, K] int32, as the intermediate `expert_idx` of another application has them.
    tokens: the batch.
  """
  experts = checkpoint_name(experts, 'routing')
  gates = routing.gates_of(selected.scores, experts, cfg)
  return routing.without(routing.Routing(gates, experts, selected.scores), tokens.mask)


def drop(
  cfg: moe_config.MoEConfig,
  train: bool,
  decision: routing.Routing,
  tokens: routing.Tokens,
  layer: Array,
) -> routing.Routing:
  """The decision without the choices that are not computed; arguments as in `select`."""
  if train and cfg.options.random_second_expert:
    keep = gshard.keeps_second(cfg, decision, tokens, layer)
    decision = routing.without_choices(decision, keep)
  if drops(cfg, train):
    if not train:  # exempt rows are a rule of training
      room = dataclasses.replace(cfg.capacity, exempt_fraction=0.0)
      cfg = dataclasses.replace(cfg, capacity=room)
    decision = routing.without_choices(decision, capacity.keep(cfg, decision, tokens))
  return decision
