"""The value head of PPO: one linear map from the final hidden state of a place to a number.

Policy and value share one trunk, and its gradient is that of both losses: a critic of its own would
be a second model with second moments and a second routing, where this is D + 1 numbers. The head
lies in the state as `params['value_head']`, float32, and begins at 0: nothing is expected, and the
first gradient of its loss moves no other weight. Whoever computes with a model's weights takes
those `without` it; a checkpoint is read, asked and exported as that of any other run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import trees
from moe_jax.config import schema

Array = jax.Array
KEY = 'value_head'


def is_used(cfg: schema.Config) -> bool:
  """Whether a run has a value head."""
  return cfg.objective.kind == 'policy' and cfg.objective.policy.algorithm == 'ppo'


def started(cfg: schema.Config, params: trees.Params) -> trees.Params:
  """`params` with a head of zeros, boxed with its logical axis names; as they are without PPO."""
  if not is_used(cfg):
    return params
  head = {
    'kernel': nn.LogicallyPartitioned(jnp.zeros((cfg.model.embed_dim, 1)), ('embed', None)),
    'bias': nn.LogicallyPartitioned(jnp.zeros(1), (None,)),
  }
  return {**params, KEY: head}


def without(params: trees.Params) -> trees.Params:
  """The weights of the model alone."""
  return {name: value for name, value in params.items() if name != KEY}


def values(head: trees.Params, normed: Array) -> Array:
  """What is still to be won behind every place, [B, L] float32.

  Args:
    head: kernel [D, 1] and bias [1].
    normed: [B, L, D] hidden states before the output head.
  """
  found = jnp.einsum(
    'BLD,DU->BLU',
    normed.astype(jnp.float32),
    jnp.asarray(head['kernel']),
    precision=jax.lax.Precision.HIGHEST,
  )
  return (found + head['bias'])[..., 0]


def may_rest(cfg: schema.Config) -> bool:
  """Whether the policy rests in some steps of a run."""
  return is_used(cfg) and cfg.objective.policy.ppo.value_warmup > 0


def rests(cfg: schema.Config, step: Array) -> Array | None:
  """[] bool, whether the policy rests at `step` while the head learns; None if it never does."""
  policy = cfg.objective.policy
  if not may_rest(cfg):
    return None
  return step < policy.ppo.value_warmup * policy.updates


def alone(resting: Array | None, tree: Any, other: Any) -> Any:
  """`tree`, and while the policy rests all of `other` but the head; both as `params`."""
  if resting is None:
    return tree
  new = jax.tree.map(lambda a, b: jnp.where(resting, b, a), without(tree), without(other))
  return {**new, KEY: tree[KEY]}


def scaled(cfg: schema.Config, updates: Any) -> Any:
  """Updates of an optimizer, those of the head at its own rate (`ppo.value_rate`)."""
  if not is_used(cfg):
    return updates
  rate = cfg.objective.policy.ppo.value_rate
  return {**updates, KEY: jax.tree.map(lambda x: rate * x, updates[KEY])}
