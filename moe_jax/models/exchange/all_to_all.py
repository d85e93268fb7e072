"""All-to-all with buffers of a fixed size: C rows from every device to every other.

C is the number of tokens T, which always suffices, or what capacities leave of it (dispatch
'capacity': nothing is lost then that routing has not dropped before), or `buffer_factor` times what
balanced experts need.
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
  """Arguments and results as in `all_gather.exchange`."""
  num_devices = jax.lax.axis_size(buffers.AXIS)
  num_here, (num_tokens, k) = cfg.num_experts // num_devices, expert_idx.shape
  fan = buffers.fan_out(cfg, k, num_devices)
  room = buffers.rows_for(cfg.exchange.buffer_factor, num_tokens * fan / num_devices, most)
  with jax.named_scope('plan'):
    wanted = buffers.destinations(expert_idx, num_here, num_devices)
    sent = wanted & (jnp.cumsum(wanted, axis=0) <= room)
    start = jnp.arange(num_devices, dtype=jnp.int32) * room
    plan = buffers.make(sent, start, num_devices * room, fan)
    device = jnp.arange(num_devices * room, dtype=jnp.int32) // room
    # Ids are sent plus one: rows that hold no token are zeros.
    ids = buffers.spread(expert_idx + 1, plan) - 1
    local = buffers.localise(jnp.where(ids < 0, cfg.num_experts, ids), device, num_here)
  with jax.named_scope('exchange'):
    swap = functools.partial(
      jax.lax.all_to_all, axis_name=buffers.AXIS, split_axis=0, concat_axis=0, tiled=True
    )
    both = buffers.pack(buffers.spread(gates, plan), local)
    both = buffers.unpack(swap(both), num_here)
    received = sorted_plan.Assigned(swap(buffers.spread(x, plan)), *both)
  out, beyond = compute(received)
  with jax.named_scope('exchange'):
    out = buffers.collect(swap(out), plan)
  return out, beyond + buffers.lost_choices(expert_idx, sent, num_here)
