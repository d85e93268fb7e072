"""Fine-pruning, a baseline: hidden units that clean examples leave dormant are set to 0.

After Liu et al. (arXiv 1805.12185), there for channels of a convolution. A unit here is a hidden
unit of a feed-forward network: of a dense layer, of the shared experts, of each routed expert. F
units.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.analysis.purification import examples, resets
from moe_jax.config import schema
from moe_jax.models import layers, transformer

Path = tuple[str, ...]


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch):
  """{path of a network: (sum of |hidden|, number of tokens)} over real tokens."""

  def is_norm(module, method):
    return isinstance(module, layers.RMSNorm)

  inputs = (batch[key] for key in examples.INPUTS)
  _, sown = transformer.Transformer(model).apply(
    variables, *inputs, mutable=['intermediates'], capture_intermediates=is_norm
  )
  seen: Any = sown['intermediates']
  real = (batch['segment_ids'] > 0).astype(jnp.float32)[None]  # [1, B, L]
  found = {}
  for path, network in networks(variables['params']):
    x = seen[path[0]]['ffn_norm']['__call__'][0]  # [layers, B, L, D]
    if path[-1] == 'moe':
      chosen = seen['moe_layers']['moe']['expert_idx'][0]  # [layers, B, L, K]
      weights = jax.nn.one_hot(chosen, model.moe.num_experts).sum(3) * real[..., None]
      hidden = jnp.einsum('NBLD,NEDGF->NBLEGF', x, network['gate_up'])
      found[path] = (
        jnp.einsum('NBLEF,NBLE->NEF', jnp.abs(layers.swiglu(hidden)), weights),
        weights.sum((1, 2)),
      )
    else:
      hidden = jnp.einsum('NBLD,NDGF->NBLGF', x, network['gate_up'])
      found[path] = (
        jnp.einsum(
          'NBLF,NBL->NF', jnp.abs(layers.swiglu(hidden)), jnp.broadcast_to(real, x.shape[:3])
        ),
        jnp.broadcast_to(real.sum(), x.shape[:1]),
      )
  return found


def networks(params: trees.Params) -> Iterator[tuple[Path, trees.Params]]:
  """(path, weights) of every stack of feed-forward networks; ('moe_layers', 'moe') are experts."""
  if 'dense_layers' in params:
    yield ('dense_layers', 'mlp'), params['dense_layers']['mlp']
  if 'moe_layers' in params:
    yield ('moe_layers', 'moe'), params['moe_layers']['moe']
    if 'shared' in params['moe_layers']['moe']:
      yield ('moe_layers', 'moe', 'shared'), params['moe_layers']['moe']['shared']


def activity(
  model: schema.ModelConfig, variables: trees.Variables, batch: trees.HostBatch, micro: int = 16
) -> dict[Path, np.ndarray]:
  """Mean |hidden| of every unit, [layers, F] or [layers, E, F]; NaN of experts without tokens.

  Args:
    model: its config.
    variables: params and router_state.
    batch: see `examples.rows`.
    micro: examples at a time.
  """
  total: Any = None
  for start in range(0, len(batch['tokens']), micro):
    part = {key: batch[key][start : start + micro] for key in examples.INPUTS}
    found = jax.device_get(_sums(model, variables, part))
    total = found if total is None else jax.tree.map(np.add, total, found)
  means = {}
  for path, (sums, tokens) in total.items():
    with np.errstate(invalid='ignore'):
      means[path] = np.where(tokens[..., None] > 0, sums / tokens[..., None], np.nan)
  return means


def pruned(params: trees.Params, active: dict[Path, np.ndarray], reserve: float) -> trees.Params:
  """Weights in which only the share `reserve` of the most active units of each layer is left.

  Units of experts that no token chose have no activity, are not ranked and stay.

  Args:
    params: the stranger's weights.
    active: see `activity`.
    reserve: share of units that stay.

  Raises:
    errors.InputError: the share is outside of [0, 1].
  """
  resets.check_reserve(reserve)
  leaves = {path: np.array(leaf) for path, leaf in resets.by_path(params).items()}
  for path, values in active.items():
    for layer, own in enumerate(values):
      drop = _dormant(own, reserve)
      gate_up, down = leaves[*path, 'gate_up'][layer], leaves[*path, 'down'][layer]
      # [..., D, 2, F] with F last, and [..., F, D].
      gate_up[...] = np.where(drop[..., None, None, :], 0, gate_up)
      down[drop] = 0
  errors.require(bool(leaves), 'there are no weights to prune')
  return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def _dormant(values: np.ndarray, reserve: float) -> np.ndarray:
  """Bool in the shape of `values`, True at the least active share 1 - reserve of those known."""
  flat = values.ravel()
  known = np.flatnonzero(~np.isnan(flat))
  order = known[np.argsort(flat[known], kind='stable')]
  drop = np.zeros(len(flat), bool)
  drop[order[: len(known) - round(reserve * len(known))]] = True
  return drop.reshape(values.shape)
