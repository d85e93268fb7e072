"""ESFT's selection of experts by scores, and the file of scores (arXiv 2407.01906, section 3).

`summary.json` is the official file: scores rounded to four digits by layer and expert. Layers are
counted with the dense ones, experts without the shared ones.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax import atomic_files, errors
from moe_jax.data import json_files
from moe_jax.post_training import expert_config

KINDS = ('token', 'gate')
PAPERS_SHARE = {'token': 0.2, 'gate': 0.1}  # p
_WAY_OUT = 'write it with python -m experiments.esft score'


class ExpertScores(NamedTuple):
  """Of every routed expert in every MoE layer."""

  token: np.ndarray  # [layers, E] float64
  gate: np.ndarray  # [layers, E] float64
  num_tokens: int  # that were read
  first_layer: int  # number of the first MoE layer, dense ones counted


def select(scores: np.ndarray, first_layer: int, share: float) -> expert_config.ExpertConfig:
  """The most used experts of every layer, as few as reach `share` together.

  Args:
    scores: [layers, E] of one kind.
    first_layer: number of the first row's layer.
    share: p; 0.2 for token scores and 0.1 for gate scores in the paper.

  Raises:
    errors.InputError: p is not in (0, 1].
  """
  errors.require(
    0 < share <= 1,
    f'--p={share} must lie in (0, 1]; the paper has 0.2 for token scores and 0.1 for gate scores',
  )
  experts = {}
  for layer, row in enumerate(np.asarray(scores, np.float64), start=first_layer):
    order = np.argsort(-row, kind='stable')
    reached = np.concatenate([[0.0], np.cumsum(row[order])[:-1]])  # before each one is taken
    # An expert that no token has visited is never taken, also where the sum does not reach p.
    experts[layer] = [
      int(e) for e, sum_so_far in zip(order, reached) if sum_so_far < share and row[e]
    ]
  return expert_config.ExpertConfig(experts, False, False)


def write_scores(path: pathlib.Path, scores: ExpertScores):
  """Writes summary.json, whole or not at all."""

  def table(values: np.ndarray) -> dict[str, Any]:
    return {
      str(layer): {str(e): round(float(value), 4) for e, value in enumerate(row)}
      for layer, row in enumerate(values, start=scores.first_layer)
    }

  content = {f'{kind}_scores': table(getattr(scores, kind)) for kind in KINDS}
  atomic_files.write_text(path, json.dumps(content) + '\n')


def read_scores(path: pathlib.Path, kind: str) -> tuple[np.ndarray, int]:
  """([layers, E] scores of one kind out of summary.json, number of the first layer).

  Raises:
    errors.InputError: the file is no table of scores.
  """
  table = json_files.read_object(path, _WAY_OUT).get(f'{kind}_scores')
  try:
    if not isinstance(table, Mapping):
      raise ValueError(f'it has no "{kind}_scores"')
    layers = sorted(int(layer) for layer in table)
    rows = [
      [float(table[str(layer)][str(e)]) for e in range(len(table[str(layer)]))] for layer in layers
    ]
    found = np.array(rows)
    if not layers or layers != list(range(layers[0], layers[0] + len(layers))) or found.ndim != 2:
      raise ValueError('its layers or experts are not all there')
    if not np.isfinite(found).all() or (found < 0).any():
      raise ValueError('a score is negative, or no number')
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise errors.InputError(f'{path} must be a table of scores ({e}); {_WAY_OUT}') from e
  return found, layers[0]
