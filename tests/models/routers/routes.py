"""What the tests of models.routers share."""

import functools

import numpy as np

from moe_jax.config import moe_config
from moe_jax.models.routers import ROUTERS, routing, scoring
from tests import tiny

PROBS = np.array(
  [[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45], [0.125, 0.5, 0.125, 0.25]]], np.float32
)  # [B=1, L=3, E=4]
LOGITS = np.log(PROBS)
EXACT = dict(rtol=1e-6)  # float32 exp and log are good to a few units in the last place


@functools.cache
def make(e=4, k=2, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig`."""
  values = {'num_experts': e, 'num_experts_per_tok': k} | overrides
  return tiny.make(**{f'model__moe__{key}': v for key, v in values.items()}).model.moe


def tokens_of(b, length, mask=None, ids=None, row=None, seed=0) -> routing.Tokens:
  return routing.Tokens(
    ids=np.zeros((b, length), np.int32) if ids is None else np.asarray(ids, np.int32),
    mask=np.ones((b, length), bool) if mask is None else np.asarray(mask, bool),
    row=np.arange(b, dtype=np.int32) if row is None else np.asarray(row, np.int32),
    seed=np.uint32(seed),
  )


@functools.partial(tiny.jit, static_argnums=(0, 1))
def compiled_route(cfg, train, logits, tokens, layer, state):
  scores = scoring.SCORE_FUNCS[cfg.score_func](logits)
  selection = scoring.selection(scores, state, cfg)
  inputs = routing.Inputs(scores, selection, tokens, layer, state)
  return routing.without(ROUTERS[cfg.router].route(inputs, cfg, train), tokens.mask)


def route(cfg, logits=LOGITS, tokens=None, train=True, layer=0, state=None) -> routing.Routing:
  """What the MoE layer does with logits, without its weights."""
  tokens = tokens_of(*logits.shape[:2]) if tokens is None else tokens
  return compiled_route(
    cfg, train, np.asarray(logits, np.float32), tokens, np.int32(layer), state or {}
  )


def ds_moe(rule, logits=LOGITS, train=False, mask=None, **overrides):
  cfg = make(router='ds_moe', options__inference=rule, **overrides)
  return route(cfg, logits, tokens_of(*logits.shape[:2], mask=mask), train=train)
