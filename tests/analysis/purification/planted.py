"""A tiny model, clean examples and weights of which a known part has moved."""

import functools

import jax
import numpy as np

from moe_jax.analysis.purification import fisher
from tests import tiny


@functools.cache
def model(**more):
  return tiny.make(**more).model


def variables(cfg):
  return {'params': tiny.params(cfg), 'router_state': tiny.router_state(cfg)}


def batch(number=5, length=6, seed=0):
  """Examples whose last three real tokens are the answer; the rest of a row is padding."""
  rng = np.random.default_rng(seed)
  width = 16
  segments = np.repeat((np.arange(width) < length)[None].astype(np.int32), number, 0)
  targets = rng.integers(32, size=(number, width)).astype(np.int32)
  targets[:, : length - 3] = targets[:, length:] = -1
  return {
    'tokens': rng.integers(32, size=(number, width)).astype(np.int32) * segments,
    'targets': targets,
    'positions': np.repeat(np.arange(width, dtype=np.int32)[None], number, 0),
    'segment_ids': segments,
  }


@functools.cache
def curvature():
  return fisher.measure(model(), variables(model()), batch(), 5)


def numpy_params():
  return jax.tree.map(np.asarray, tiny.params(model()))
