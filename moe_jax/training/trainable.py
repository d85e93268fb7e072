"""Which weights a run trains, `config.trainable`: all, chosen experts (ESFT), or pairs of LoRA.

A state keeps all weights, which whoever reads it needs. Gradients, the optimizer's moments, the
gradient norm and the weight decay are of the trained ones alone: of the stacked kernels of the
routed experts only the rows of the chosen ones, S in all layers together.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.training import lora, value_head

_STACK = ('moe_layers', 'moe')
_ROUTED = ('gate_up', 'down')  # in _STACK, leaves [MoE layers, E, ...]


def started(cfg: schema.Config, params: trees.Params, rng: jax.Array) -> trees.Params:
  """The weights of a model with what a run adds to them: pairs of LoRA, a value head."""
  return value_head.started(cfg, lora.started(cfg, params, rng))


def select(cfg: schema.Config, params: trees.Params) -> trees.Params:
  """The trained weights, nested and named as in `params`; of chosen experts [S, ...].

  The leaves may be boxed with logical axis names; those of what is returned are then, too.
  """
  return rows(cfg, leaves(cfg, params))


def leaves(cfg: schema.Config, params: trees.Params) -> trees.Params:
  """The leaves of `params`, whole, of which something is trained."""
  if cfg.trainable.kind == 'all':
    return params
  return _part(params, functools.partial(is_trained, cfg.trainable))


def is_trained(trained: schema.TrainableConfig, path: Sequence[str]) -> bool:
  """Whether a leaf, given by the names that lead to it, is trained; of routed experts, in part."""
  if trained.kind == 'all' or path[0] == value_head.KEY:
    return True
  if trained.kind == 'lora':
    return path[0] == lora.KEY and path[-1] != lora.SCALE
  if tuple(path[:2]) != _STACK or path[2] not in (*_ROUTED, 'shared'):
    return trained.non_expert_modules and path[0] != 'mtp_layers'
  return trained.shared_experts if path[2] == 'shared' else any(trained.experts)


def rows(cfg: schema.Config, leaves: trees.Params) -> trees.Params:
  """What is trained of `leaves`: the rows of chosen experts, [S, ...], and all else whole."""
  if cfg.trainable.kind != 'experts':
    return leaves
  where = places(cfg.trainable)
  gathered = {name: _gathered(leaf, where) for name, leaf in _routed(leaves).items()}
  return overlaid(leaves, _nested(gathered))


def merge(cfg: schema.Config, params: trees.Params, trained: trees.Params) -> trees.Params:
  """`params` with the trained weights in their place; `trained` as `select` returns them."""
  if cfg.trainable.kind == 'all':
    return trained
  if cfg.trainable.kind == 'lora':
    return overlaid(params, trained)
  where, old = places(cfg.trainable), _routed(params)
  kernels = {
    name: jnp.asarray(old[name]).at[where].set(new, indices_are_sorted=True, unique_indices=True)
    for name, new in _routed(trained).items()
  }
  return overlaid(params, overlaid(trained, _nested(kernels)))


def count(cfg: schema.Config) -> int:
  """Parameters that are trained."""

  def made() -> trees.Params:
    params = partitioning.unbox(model_variables.init(cfg.model, jax.random.key(0))['params'])
    return select(cfg, partitioning.unbox(started(cfg, params, jax.random.key(0))))

  found = jax.eval_shape(made)
  return sum(leaf.size for leaf in jax.tree.leaves(found))


def expanded(cfg: schema.Config, params: trees.Params, grads: trees.Params) -> trees.Params:
  """Gradients of trained weights with the shapes of `params`, 0 elsewhere."""
  return merge(cfg, jax.tree.map(jnp.zeros_like, params), grads)


def overlaid(old: trees.Json, new: trees.Json) -> dict[str, Any]:
  """`old` with the leaves that `new` has in their place, nested dicts."""
  return {
    key: overlaid(value, new.get(key, {})) if isinstance(value, Mapping) else new.get(key, value)
    for key, value in old.items()
  }


def places(trained: schema.TrainableConfig) -> tuple[np.ndarray, np.ndarray]:
  """(layer among the MoE layers, expert) of every chosen expert, [S] each, in order."""
  pairs = [(i, e) for i, experts in enumerate(trained.experts) for e in sorted(experts)]
  layers, experts = np.array(pairs, np.int32).reshape(-1, 2).T
  return layers, experts


def _gathered(leaf: Any, where: tuple[np.ndarray, np.ndarray]) -> Any:
  """[MoE layers, E, ...] -> [S, ...]."""
  if isinstance(leaf, nn.LogicallyPartitioned):
    return leaf.replace(value=leaf.value[where], names=(None, *leaf.names[2:]))
  return leaf[where]


def _routed(tree: trees.Params) -> dict[str, Any]:
  """Those of the routed experts' kernels that a tree of weights has, by name."""
  moe = tree.get(_STACK[0], {}).get(_STACK[1], {})
  return {name: moe[name] for name in _ROUTED if name in moe}


def _nested(kernels: trees.Json) -> trees.Params:
  """The inverse of `_routed`."""
  return {_STACK[0]: {_STACK[1]: kernels}}


def _part(
  tree: trees.Json, is_trained: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> trees.Params:
  """The leaves of nested dicts whose path is trained; no empty dicts."""
  found = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      inner = _part(value, is_trained, (*path, name))
      found |= {name: inner} if inner else {}
    elif is_trained((*path, name)):
      found[name] = value
  return found
