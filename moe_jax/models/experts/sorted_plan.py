"""Where every (token, choice) goes: integers, made once per layer for forward and backward.

The rows that experts work on are sorted by expert. Activations are only ever gathered by these
integers, in both directions; the one scatter is the int32 inverse permutation.

A = T K choices, an assignment each, have up to `num_rows` rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.devices import hardware, unrolled

Array = jax.Array


class Assigned(NamedTuple):
  """Tokens of a device, and the experts that each of them goes to."""

  x: Array  # [T, D]
  gates: Array  # [T, K] float32
  expert_idx: Array  # [T, K] int32, numbers among the experts that compute; their number = none


class Plan(NamedTuple):
  """A sorted layout of rows in E groups.

  Every group starts at a multiple of the alignment. Rows that hold no choice are padding: gathers
  by `row_choice` read zeros there, because A is out of bounds. With alignment 1 and no limit the
  groups cover all rows (unrouted choices sit, as zero rows, in the last group), so that no kernel
  leaves a row unwritten. Under a limit the rows behind the last group belong to nobody: they cost
  no work, and what a kernel leaves there is undefined.
  """

  row_choice: Array  # [rows] int32, row -> flat (token, choice), A on padding rows
  choice_row: Array  # [T, K] int32, (token, choice) -> row, `rows` where not routed
  group_sizes: Array  # [E] int32, rows of each expert, padding included


def take(a: Array, index: Array) -> Array:
  """Rows of a; zeros where the index is out of bounds."""
  return a.at[index].get(mode='fill', fill_value=0)


def sum_rows(rows: Array, index: Array) -> Array:
  """rows [rows, ...], index [T, K] -> [T, ...]: the sum of each token's K rows, in float32.

  On a CPU K gathers are added up in one pass (`unrolled`). Elsewhere the K terms are the first
  axis: a TPU would pad a short second one to 8.
  """
  if hardware.platform() == 'cpu' and unrolled.pays(index.shape[1]):

    def term(s: int) -> Array:
      return take(rows, index[:, s]).astype(jnp.float32)

    return unrolled.reduce(jnp.add, term, index.shape[1]).astype(rows.dtype)
  return take(rows, index.T).sum(axis=0, dtype=jnp.float32).astype(rows.dtype)


def num_rows(num_choices: int, num_experts: int, align: int) -> int:
  """The rows that A choices of E experts, whichever, fit into at this alignment."""
  most = num_choices + min(num_experts, num_choices) * (align - 1)
  return most // align * align


def max_choices(num_experts: int) -> int:
  """The most choices A among E experts (and the unrouted) that int32 sort keys can number."""
  return 1 << ((2**31 - 1) // (num_experts + 1)).bit_length() - 1


def make_plan(expert_idx: Array, num_experts: int, align: int, limit: int | None = None) -> Plan:
  """Sorts the choices by expert; ties keep token order.

  Args:
    expert_idx: [T, K] int32 in 0..E; E means not routed.
    num_experts: E.
    align: rows to which the size of every group is rounded up.
    limit: choices that get a row, in order of experts; None = all.

  Raises:
    ValueError: (E + 1) * T * K does not fit the packed int32 sort key.
  """
  num_tokens, k = expert_idx.shape
  m = num_tokens * k
  bits = (m - 1).bit_length()
  if m > max_choices(num_experts):
    raise ValueError(
      f'{num_experts} experts x {m} choices overflow the int32 sort key; '
      'lower train.micro_batch_size so that a forward pass holds fewer tokens'
    )
  # One packed key makes an unstable single-operand sort equal to a stable argsort.
  choice = jnp.arange(m, dtype=jnp.int32)
  key = jax.lax.sort((expert_idx.reshape(m) << bits) | choice, is_stable=False)
  choice_at, expert_at = key & ((1 << bits) - 1), key >> bits
  edge = jnp.searchsorted(key, jnp.arange(num_experts + 1, dtype=jnp.int32) << bits)
  edge = edge.astype(jnp.int32)
  if limit is not None:
    edge = jnp.minimum(edge, limit)
  count = jnp.diff(edge)
  rows = num_rows(m if limit is None else min(m, limit), num_experts, align)
  aligned = -(-count // align) * align
  if align == 1 and limit is None:
    aligned = aligned.at[-1].add(m - edge[-1])
  end = jnp.cumsum(aligned)
  start = end - aligned

  row = jnp.arange(rows, dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(end, row, side='right'), num_experts - 1)
  offset = row - start[group]
  source = jnp.clip(edge[group] + offset, 0, m - 1)
  row_choice = jnp.where(offset < count[group], choice_at[source], m)

  routed = choice < edge[-1]
  group_at = jnp.minimum(expert_at, num_experts - 1)
  row_at = jnp.where(routed, start[group_at] + choice - edge[group_at], rows)
  choice_row = jnp.zeros(m, jnp.int32).at[choice_at].set(row_at, unique_indices=True)
  return Plan(row_choice, choice_row.reshape(num_tokens, k), aligned)
