"""Tables that a run puts into the routers' state before its first step: numpy, on the host."""

import pathlib

import numpy as np

from moe_jax import errors
from moe_jax.config import moe_config
from moe_jax.data import npz_files


def balanced_table(
  counts: np.ndarray, num_experts: int, experts_per_tok: int, rng: np.random.Generator
) -> np.ndarray:
  """Token ids to experts such that experts see equally many tokens (Hash Layer, section 3.1).

  Greedy: the most frequent id first, each to the K experts with the fewest tokens so far; `rng`
  orders the ids and experts that are equal, so that layers differ.

  Args:
    counts: [V] occurrences of each id in the training text.
    num_experts: E.
    experts_per_tok: K.
    rng: source of the layer's order.

  Returns:
    [V, K] int32.
  """
  load = np.zeros(num_experts)
  table = np.zeros((len(counts), experts_per_tok), np.int32)
  for token in np.lexsort((rng.random(len(counts)), -counts)):
    order = np.lexsort((rng.random(num_experts), load))[:experts_per_tok]
    table[token] = order
    # An id that never occurs still weighs a little: unseen ids must not pile up on one expert.
    load[order] += counts[token] + 1e-3
  return table


def load_assignments(cfg: moe_config.MoEConfig, shape: tuple[int, ...]) -> np.ndarray:
  """The recorded assignments of `options.replay_path`, [layers, rows, L, K] int32.

  Raises:
    errors.InputError: the file is missing, unreadable, of another shape, or names no such expert.
  """
  path = pathlib.Path(cfg.options.replay_path)
  name = f'config.model.moe.options.replay_path={str(path)!r}'
  try:
    has, dtype = npz_files.headers(path)['expert_idx']
    fits = has == shape and np.issubdtype(dtype, np.integer)
    found = npz_files.read(path, 'expert_idx') if fits else np.empty(0, int)
  except npz_files.DAMAGE as e:
    raise errors.InputError(
      f'{name} must be an .npz file with an array expert_idx, as experiments.routing --save writes '
      f'it: {e}'
    ) from e
  if not fits:
    raise errors.InputError(
      f'{name} holds assignments of shape {list(has)} and type {dtype}, but this model needs '
      f'integers [layers, rows, L, K] = {list(shape)}; record them with a model of these sizes, or '
      'set replay_rows'
    )
  ordered = np.sort(found, axis=-1)
  twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < cfg.num_experts)
  if found.min() < 0 or found.max() > cfg.num_experts or twice.any():
    raise errors.InputError(
      f'{name} must give every token different experts between 0 and {cfg.num_experts - 1}, or '
      f'{cfg.num_experts} for none; record it again with experiments.routing --save'
    )
  return found.astype(np.int32)
