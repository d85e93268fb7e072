"""In how many experts a drift lives: shares of indicator and of reset weights by expert."""

import numpy as np

from moe_jax import trees
from moe_jax.analysis.purification import fisher


def by_expert(values: trees.Params) -> np.ndarray:
  """[layers, E] float64: sums of a tree's values over the weights of each routed expert."""
  routed = values['moe_layers']['moe']
  parts = (np.asarray(routed[key], np.float64) for key in fisher.ROUTED)
  return np.sum([part.reshape(*part.shape[:2], -1).sum(axis=-1) for part in parts], axis=0)


def needed_for(mass: np.ndarray, share: float) -> float:
  """The fewest experts that hold `share` of a mass, as a part of all experts; NaN without mass.

  Args:
    mass: [layers, E], not below 0.
    share: in (0, 1].
  """
  flat = np.sort(np.where(np.isfinite(mass), mass, 0.0).ravel())[::-1]
  if not flat.sum():
    return float('nan')
  reached = np.cumsum(flat) / flat.sum()
  return (int(np.searchsorted(reached, share - 1e-12)) + 1) / flat.size


def highest(mass: np.ndarray, share: float) -> np.ndarray:
  """[layers, E] bool, the share of the experts with the largest mass, at least one above 0."""
  count = max(round(share * mass.size), 1) if share > 0 else 0
  found = np.zeros(mass.size, bool)
  found[np.argsort(-mass.ravel(), kind='stable')[:count]] = True
  return found.reshape(mass.shape)
