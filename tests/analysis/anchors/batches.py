"""Prompts of random ids, and a tiny model that reads them; what the tests of anchors share."""

import numpy as np

from moe_jax.analysis.anchors import prompts
from tests import tiny

CLASSES, LABEL_IDS = 3, np.array([28, 29, 30])
KINDS = [0] + CLASSES * [0, 1, 1, 0, 2, 0] + [0, 1, 1, 0]


DENSE = {
  'model__num_dense_layers': 0,
  'model__moe__num_experts': 0,
  'model__moe__num_shared_experts': 0,
}


def model(moe=False, **overrides):
  """(config, variables): two dense layers, or a dense and an MoE layer; two heads share a key."""
  cfg = tiny.make(
    model__num_layers=2,
    model__num_heads=4,
    model__attention__num_kv_heads=2,
    model__max_seq_len=32,
    **({} if moe else DENSE),
    **overrides,
  ).model
  return cfg, {'params': tiny.params(cfg), 'router_state': tiny.router_state(cfg) if moe else {}}


def prompt(rng, shorter=0):
  """A prompt of 23 tokens, less those of its last text."""
  kinds = np.array(KINDS[: len(KINDS) - 3] + KINDS[len(KINDS) - 3 + shorter :], np.int32)
  ids = rng.integers(1, 28, size=len(kinds)).astype(np.int32)
  (places,) = (kinds == prompts.LABEL).nonzero()
  classes = rng.permutation(CLASSES)
  ids[places] = LABEL_IDS[classes]
  start = places[-1] + 2
  return prompts.Prompt(
    ids, kinds, places.astype(np.int32), classes.astype(np.int32), start, int(rng.integers(CLASSES))
  )


def batch(rows=2, seed=0):
  rng = np.random.default_rng(seed)
  return prompts.stack(
    [prompt(rng, shorter=i % 2) for i in range(rows)], [LABEL_IDS] * rows, length=24
  )
