"""Ring of experts: gather all tokens of the group, compute with the experts here, reduce-scatter.

Each device receives P - 1 times its own tokens, whatever the routing: the simplest exchange, and
the cheapest while most tokens need most devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.config import moe_config
from moe_jax.models.exchange import buffers
from moe_jax.models.experts import sorted_plan

Array = jax.Array


def exchange(
  compute: Callable[[sorted_plan.Assigned], tuple[Array, Array]],
  cfg: moe_config.MoEConfig,
  x: Array,
  gates: Array,
  expert_idx: Array,
  most: int,
) -> tuple[Array, Array]:
  """The gated sum of each token's experts, wherever they live.

  Args:
    compute: the gated sums [rows, D] of received rows over this device's experts, and the number
      of choices that it had no room for.
    cfg: experts, groups, buffers.
    x: [T, D], tokens of this device.
    gates: [T, K] float32.
    expert_idx: [T, K] int32; E = not routed.
    most: no device needs more than so many tokens of this one; T, or what capacities leave.

  Returns:
    ([T, D]; [] int32, choices that found no room on this device, as sender or receiver).
  """
  del most  # all tokens are gathered
  num_here = cfg.num_experts // jax.lax.axis_size(buffers.AXIS)
  gather = functools.partial(jax.lax.all_gather, axis_name=buffers.AXIS, tiled=True)
  everyone = gather(expert_idx)
  device = jnp.broadcast_to(jax.lax.axis_index(buffers.AXIS), everyone.shape[:1])
  local = buffers.localise(everyone, device, num_here)
  out, beyond = compute(sorted_plan.Assigned(gather(x), gather(gates), local))
  out = jax.lax.psum_scatter(out, buffers.AXIS, scatter_dimension=0, tiled=True)
  return out, beyond
