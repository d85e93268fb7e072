"""Which token goes to which device: integers, made once per layer for forward and backward.

Axis letters are those of `moe_jax.models`: T tokens of a device, P devices of an expert-parallel
group, E experts in all and E/P on a device. `rows` are those of a buffer, and `fan` counts the
devices that one token may need.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import moe_config
from moe_jax.models import layers
from moe_jax.models.experts import sorted_plan

Array = jax.Array

AXIS = 'expert'  # of the mesh


class SendPlan(NamedTuple):
  """Where a device lays the copies of its tokens that it sends."""

  row_token: Array  # [rows] int32, row -> token, T on rows that hold none
  token_row: (
    Array  # [T, fan] int32, the rows of a token's copies, their number where it has no more
  )


def fan_out(cfg: moe_config.MoEConfig, num_choices: int, num_devices: int) -> int:
  """To how many devices a token is sent at most, by K and by device-limited routing."""
  most = min(num_choices, num_devices)
  if cfg.num_expert_groups == 1:
    return most
  here, group = (
    cfg.num_experts // num_devices,
    moe_config.group_size(cfg.num_experts, cfg.num_expert_groups),
  )
  if here % group == 0:
    span = 1
  elif group % here == 0:
    span = group // here
  else:
    span = -(-group // here) + 1
  return min(most, cfg.num_limited_groups * span)


def rows_for(factor: float, mean: float, most: int) -> int:
  """Rows of a buffer that holds `factor` times the mean, at most `most`; all of them for 0."""
  return most if not factor else min(most, math.ceil(factor * mean))


def destinations(expert_idx: Array, num_here: int, num_devices: int) -> Array:
  """[T, K] expert ids (E = none) -> [T, P] bool, the devices that a token's experts live on."""
  return (expert_idx[..., None] // num_here == jnp.arange(num_devices)).any(axis=1)


def make(sent: Array, start: Array, num_rows: int, fan: int) -> SendPlan:
  """Lays the copies for one device after those for the one before, tokens in order.

  Args:
    sent: [T, P] bool, which copies there are.
    start: [P] int32, first row of each device's copies.
    num_rows: of the buffer.
    fan: no token has more copies.
  """
  num_tokens, num_devices = sent.shape
  rank = jnp.cumsum(sent, axis=0, dtype=jnp.int32) - 1
  row = jnp.where(sent, start + rank, num_rows)  # [T, P]
  token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], row.shape)
  row_token = jnp.full(num_rows, num_tokens, jnp.int32)
  row_token = row_token.at[row].set(token, mode='drop')
  token_row = jnp.sort(row, axis=1)[:, :fan]  # rows in order of devices, absent ones last
  found = SendPlan(row_token, token_row)
  return jax.tree.map(lambda a: checkpoint_name(a, 'plan'), found)


def lost_choices(expert_idx: Array, sent: Array, num_here: int) -> Array:
  """[] int32, choices [T, K] whose device's copy is not among those `sent` [T, P]."""
  num_devices = sent.shape[1]
  device = expert_idx // num_here
  arrived = jnp.take_along_axis(sent, jnp.minimum(device, num_devices - 1), axis=1)
  return ((device < num_devices) & ~arrived).sum(dtype=jnp.int32)


@jax.custom_vjp
def spread(x: Array, plan: SendPlan) -> Array:
  """[T, ...] -> [rows, ...]: every copy of every token; zeros on rows that hold none."""
  return sorted_plan.take(x, plan.row_token)


@jax.custom_vjp
def collect(rows: Array, plan: SendPlan) -> Array:
  """[rows, ...] -> [T, ...]: the sum over each token's copies, in float32."""
  return sorted_plan.sum_rows(rows, plan.token_row)


# Each is the transpose of the other: gathers in both directions, never a scatter of activations.
spread.defvjp(
  lambda x, plan: (spread(x, plan), plan),
  lambda plan, g: (collect(g, plan), layers.no_gradient(plan)),
)
collect.defvjp(
  lambda rows, plan: (collect(rows, plan), plan),
  lambda plan, g: (spread(g, plan), layers.no_gradient(plan)),
)


def pack(gates: Array, expert_idx: Array) -> Array:
  """Gates and ids, [rows, K] each, in one array [rows, 2 K] float32 that travels; zeros are no id.

  TPUs pad the last axis to 128 numbers, so two arrays would cost twice as much as one. Ids are
  exact in float32.
  """
  return jnp.concatenate([gates, jax.lax.stop_gradient(expert_idx + 1).astype(jnp.float32)], axis=1)


def unpack(both: Array, num_here: int) -> tuple[Array, Array]:
  """The inverse of `pack`; rows of zeros have the id E/P, none."""
  gates, ids = jnp.split(both, 2, axis=1)
  ids = jax.lax.stop_gradient(ids).astype(jnp.int32)
  return gates, jnp.where(ids == 0, num_here, ids - 1)


def localise(expert_idx: Array, device: Array, num_here: int) -> Array:
  """Ids among all experts [..., K] -> ids among those of `device` [...]; E/P elsewhere."""
  local = expert_idx - device[..., None] * num_here
  return jnp.where((local >= 0) & (local < num_here), local, num_here)


def exclusive_cumsum(a: Array, axis: int) -> Array:
  """Sums of what comes before, along an axis."""
  return jnp.cumsum(a, axis=axis, dtype=a.dtype) - a
