"""Dropless dispatch: tokens sorted by expert, grouped products, nothing dropped, static shapes.

One custom VJP around the whole expert computation: `legs`, which scatter-add no activation, so that
no result depends on the order of atomics; on a CPU `blocks`, whose loops add in a fixed order.
"""

import functools

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models.experts import backends, sorted_plan

Array = jax.Array


def dispatch(
  x: Array,
  gates: Array,
  expert_idx: Array,
  gate_up: Array,
  down: Array,
  backend: str,
  room: int,
) -> Array:
  """Sum over each token's K experts of gate * expert(x).

  Args:
    x: [T, D].
    gates: [T, K] float32.
    expert_idx: [T, K] int32; E = not routed, contributes nothing.
    gate_up: [E, D, 2, F].
    down: [E, F, D].
    backend: one of `moe_config.GROUPED_MATMULS`.
    room: choices that the buffer of all experts holds; those beyond, the last experts' last, are
      left out, so the caller counts them. 0 = all T K.

  Returns:
    [T, D] in the dtype of x.
  """
  num_experts, d = gate_up.shape[:2]
  with jax.named_scope('plan'):
    unlimited = None if backends.choose(backend).covers else expert_idx.size
    plan = sorted_plan.make_plan(expert_idx, num_experts, 1, room or unlimited)
    plan = jax.tree.map(lambda a: checkpoint_name(a, 'plan'), plan)
  return _experts(backend, bool(room), x, gates, gate_up.reshape(num_experts, d, -1), down, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(
  backend: str,
  limited: bool,
  x: Array,
  gates: Array,
  w13: Array,
  w2: Array,
  plan: sorted_plan.Plan,
) -> Array:
  return backends.choose(backend).forward(False, limited, x, gates, w13, w2, plan)[0]


def _forward(backend, limited, x, gates, w13, w2, plan):
  out, h = backends.choose(backend).forward(True, limited, x, gates, w13, w2, plan)
  return out, (x, gates, w13, w2, plan, h)


def _backward(backend, limited, residuals, d_out):
  plan = residuals[4]
  gradients = backends.choose(backend).backward(limited, *residuals, d_out)
  return *gradients, jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)


_experts.defvjp(_forward, _backward)
