"""Dropless dispatch: tokens sorted by expert, grouped products, nothing dropped, static shapes.

One custom VJP around the whole expert computation, an `expert_backend.ExpertBackend`. Grouped
products scatter-add no activation, so that no result depends on the order of atomics; on a CPU the
loops of `cpu_blocks` add in a fixed order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import layers
from moe_jax.models.experts import backends, expert_backend, sorted_plan

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
  (num_experts, d), chosen = gate_up.shape[:2], backends.choose(backend)
  with jax.named_scope('plan'):
    unlimited = None if chosen.covers else expert_idx.size
    plan = sorted_plan.make_plan(expert_idx, num_experts, 1, room or unlimited)
    plan = jax.tree.map(lambda a: checkpoint_name(a, 'plan'), plan)
  pair = gate_up.reshape(num_experts, d, -1)
  return _experts(chosen, bool(room), expert_backend.Operands(x, gates, pair, down, plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(
  backend: expert_backend.ExpertBackend, limited: bool, operands: expert_backend.Operands
) -> Array:
  """The gated sum of each token's experts, [T, D]."""
  run = functools.partial(backend.forward, keep=False, limited=limited)
  return _one_by_one(run, operands)[0]


def _forward(backend, limited, operands):
  run = functools.partial(backend.forward, keep=True, limited=limited)
  out, h = _one_by_one(run, operands)
  return out, (operands, checkpoint_name(h, 'moe_h'))  # the name that remat looks for


def _backward(backend, limited, residuals, d_out):
  operands, h = residuals
  run = functools.partial(backend.backward, limited=limited)
  x, gates, gate_up, down = _one_by_one(run, operands, h, d_out)
  no_gradient = layers.no_gradient(operands.plan)
  return (expert_backend.Operands(x, gates, gate_up, down, no_gradient),)


_experts.defvjp(_forward, _backward)


def _one_by_one(run: Callable[..., Any], *args: Any) -> Any:
  """run(*args), whose batches under `jax.vmap` (seeds as an axis) run one after the other.

  Loops with a batched number of blocks would go on until all are done and select on everything they
  carry; and kernels know no axis in front of the experts.
  """
  return jax.custom_batching.sequential_vmap(run)(*args)
