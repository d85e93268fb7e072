"""The diagonal of the empirical Fisher matrix from per-example gradients, and what it has seen.

H_i = 1/N sum_n (d L(x_n, y_n; w) / d w_i)^2 with L the mean cross-entropy of an example's targets,
at the tuned weights (the curvature of arXiv 2305.04547, section 3 of our reconstruction from its
abstract). Balance losses and multi-token prediction have no part in it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.models import transformer
from moe_jax.training import cross_entropy

Array = jax.Array
KEYS = ('tokens', 'targets', 'positions', 'segment_ids')
ROUTED = ('gate_up', 'down')


class Fisher(NamedTuple):
  """Curvature and coverage."""

  diagonal: trees.Params  # as params, numpy float32
  tokens: np.ndarray  # [layers, E] int, choices of the examples' tokens; [0, 0] of a dense model
  seen: np.ndarray  # [layers, E] bool, whether any gradient has reached the expert


def example_loss(
  model: schema.ModelConfig,
  params: trees.Params,
  router_state: trees.RouterState,
  example: trees.Batch,
) -> tuple[Array, Array]:
  """([] mean cross-entropy of one example's targets, [layers, E] choices of its tokens).

  Args:
    model: its config.
    params: weights.
    router_state: what routing remembers.
    example: arrays [L] of KEYS.
  """
  row = {key: value[None] for key, value in example.items()}
  variables = {'params': params, 'router_state': router_state}
  inputs = (row['tokens'], row['positions'], row['segment_ids'])
  out: Any = transformer.Transformer(model).apply(variables, *inputs, mutable=['intermediates'])
  total, _ = cross_entropy.next_token(out[0].logits, row['targets'])
  loss = total / jnp.maximum((row['targets'] >= 0).sum(), 1)
  if not model.is_moe:
    return loss, jnp.zeros((0, 0), jnp.int32)
  chosen = out[1]['intermediates']['moe_layers']['moe']['expert_idx'][0]  # [layers, 1, L, K]
  real = (row['segment_ids'] > 0)[None, ..., None]
  chosen = jnp.where(real, chosen, model.moe.num_experts)  # E, no expert, falls out
  counts = jax.nn.one_hot(chosen, model.moe.num_experts, dtype=jnp.int32).sum((1, 2, 3))
  return loss, counts


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch):
  """Sums over the examples of a micro-batch: squares of gradients, and choices."""

  def one(example):
    def loss(params):
      return example_loss(model, params, variables.get('router_state', {}), example)

    return jax.grad(loss, has_aux=True)(variables['params'])

  grads, counts = jax.vmap(one)(batch)
  return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)).sum(0), grads), counts.sum(0)


def measure(
  model: schema.ModelConfig,
  variables: trees.Variables,
  batch: trees.HostBatch,
  micro: int,
) -> Fisher:
  """The diagonal over clean examples, a vmap over `micro` of them at a time.

  Args:
    model: its config.
    variables: params and router_state.
    batch: [N, L] arrays of KEYS, an example in each row.
    micro: examples whose gradients are held at once.

  Raises:
    errors.InputError: there is no example or none with a target, or `micro` is below 1.
  """
  number = len(batch['tokens'])
  errors.require(micro >= 1, f'--micro={micro} examples at a time must be at least 1')
  errors.require(
    number > 0 and bool((batch['targets'] >= 0).any(axis=1).all()),
    f'--defender: {number} clean examples, each of which must have an answer to be learned; '
    'without them there is no curvature to divide by',
  )
  micro = min(micro, number)
  total: Any = None
  for start in range(0, number, micro):
    part = _padded({key: np.asarray(batch[key][start : start + micro]) for key in KEYS}, micro)
    found = jax.device_get(_sums(model, variables, part))
    total = found if total is None else jax.tree.map(np.add, total, found)
  diagonal = jax.tree.map(lambda square: square / np.float32(number), total[0])
  return Fisher(diagonal, np.asarray(total[1]), seen_experts(diagonal))


def _padded(part: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
  """A micro-batch of `rows` examples; those that are added have no target, so no gradient."""
  missing = rows - len(part['tokens'])
  fill = {key: -1 if key == 'targets' else 0 for key in part}
  return {
    key: np.pad(value, ((0, missing), (0, 0)), constant_values=fill[key])
    for key, value in part.items()
  }


def seen_experts(diagonal: trees.Params) -> np.ndarray:
  """[layers, E] bool, whether the Fisher of an expert is above 0 anywhere; [0, 0] without experts.

  A token that chooses an expert is not enough: of the last layer only those places count whose
  output is a target's.
  """
  if 'moe_layers' not in diagonal:
    return np.zeros((0, 0), bool)
  routed = diagonal['moe_layers']['moe']
  parts = [np.asarray(routed[key]) for key in ROUTED]
  return np.any([part.reshape(*part.shape[:2], -1).any(axis=-1) for part in parts], axis=0)
