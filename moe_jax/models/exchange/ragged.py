"""Ragged all-to-all: every device sends every other exactly the rows that it has for it.

The buffer that receives has P T rows, which always suffice, or `buffer_factor` times what balanced
experts fill. The devices tell each other their counts first, so that all know what fits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import moe_config
from moe_jax.devices import hardware
from moe_jax.models import layers
from moe_jax.models.exchange import buffers
from moe_jax.models.experts import sorted_plan

Array = jax.Array


class Offsets(NamedTuple):
  """Rows that go from this device to each other one, and come from there; [P] int32 each."""

  send_start: Array  # in this device's send buffer
  send_size: Array
  remote_start: Array  # where they land in the other's receive buffer
  recv_start: Array  # in this device's receive buffer
  recv_size: Array
  remote_send_start: Array  # where they lie in the other's send buffer


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
  room = buffers.rows_for(cfg.exchange.buffer_factor, num_tokens * fan, num_devices * most)
  with jax.named_scope('plan'):
    wanted = buffers.destinations(expert_idx, num_here, num_devices)
    count = wanted.sum(axis=0, dtype=jnp.int32)
    offsets = _offsets(jax.lax.all_gather(count, buffers.AXIS), room)
    offsets = jax.tree.map(lambda a: checkpoint_name(a, 'plan'), offsets)
    sent = wanted & (jnp.cumsum(wanted, axis=0) <= offsets.send_size)
    plan = buffers.make(sent, offsets.send_start, num_tokens * fan, fan)
    row = jnp.arange(num_tokens * fan, dtype=jnp.int32)
    device = jnp.searchsorted(offsets.send_start, row, side='right').astype(jnp.int32) - 1
    ids = buffers.spread(expert_idx + 1, plan) - 1
    local = buffers.localise(jnp.where(ids < 0, cfg.num_experts, ids), device, num_here)
  with jax.named_scope('exchange'):
    send = _transfer(room, num_tokens * fan)
    # Rows that nobody fills stay zeros.
    both = buffers.pack(buffers.spread(gates, plan), local)
    both = buffers.unpack(send(both, offsets), num_here)
    received = sorted_plan.Assigned(send(buffers.spread(x, plan), offsets), *both)
  out, beyond = compute(received)
  with jax.named_scope('exchange'):
    home = _transfer(num_tokens * fan, room, back=True)
    out = buffers.collect(home(out, offsets), plan)
  return out, beyond + buffers.lost_choices(expert_idx, sent, num_here)


def _offsets(count: Array, room: int) -> Offsets:
  """count [P, P], rows from device i to device j; what exceeds a buffer of `room` rows is cut."""
  start = buffers.exclusive_cumsum(count, 1)
  before = buffers.exclusive_cumsum(count, 0)
  fits = jnp.clip(room - before, 0, count)
  lands = jnp.minimum(before, room)
  me = jax.lax.axis_index(buffers.AXIS)
  return Offsets(start[me], fits[me], lands[me], lands[:, me], fits[:, me], start[:, me])


def _transfer(num_rows: int, num_rows_back: int, back: bool = False) -> Callable:
  """(rows, offsets) -> [num_rows, ...] on the other side; its gradient is the way back."""

  @jax.custom_vjp
  def move(rows, offsets):
    return _ragged_all_to_all(rows, num_rows, offsets, back)

  def backward(offsets, g):
    no_gradient = layers.no_gradient(offsets)
    return _ragged_all_to_all(g, num_rows_back, offsets, not back), no_gradient

  move.defvjp(lambda rows, offsets: (move(rows, offsets), offsets), backward)
  return move


def _ragged_all_to_all(rows: Array, num_rows: int, offsets: Offsets, back: bool) -> Array:
  """Rows on this side -> [num_rows, ...] on the other side, zeros where nothing arrives."""
  o = offsets
  there = (o.send_start, o.send_size, o.remote_start, o.recv_size)
  home = (o.recv_start, o.recv_size, o.remote_send_start, o.send_size)
  out = jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
  native = hardware.platform() != 'cpu'
  fn = jax.lax.ragged_all_to_all if native else emulated
  return fn(rows, out, *(home if back else there), axis_name=buffers.AXIS)


def emulated(
  operand: Array,
  output: Array,
  input_offsets: Array,
  send_sizes: Array,
  output_offsets: Array,
  recv_sizes: Array,
  *,
  axis_name: str,
) -> Array:
  """`jax.lax.ragged_all_to_all` where XLA has none: gathers all operands and picks its rows.

  Args:
    operand: [rows, ...], what this device sends.
    output: [received rows, ...], what it receives into.
    input_offsets: [P] int32, first row for each device in `operand`.
    send_sizes: [P] int32.
    output_offsets: [P] int32, where these rows land in each device's output.
    recv_sizes: [P] int32, rows that come from each device.
    axis_name: mesh axis.

  Returns:
    [received rows, ...]: `output` with the received rows in place.
  """
  del send_sizes  # every device knows what it receives
  me = jax.lax.axis_index(axis_name)
  gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
  first, lands = gather(input_offsets)[:, me], gather(output_offsets)[:, me]
  row = jnp.arange(len(output), dtype=jnp.int32)[:, None]
  from_device = (lands <= row) & (row < lands + recv_sizes)  # [received rows, P]
  device = from_device.argmax(axis=1)
  source = first[device] + row[:, 0] - lands[device]
  found = gather(operand)[device, jnp.clip(source, 0, len(operand) - 1)]
  arrived = from_device.any(axis=1).reshape(-1, *[1] * (output.ndim - 1))
  return jnp.where(arrived, found, output)
