"""Attention over the devices of a mesh: rows, heads and queries split, keys gathered.

Each device attends with its own rows of the batch, its own heads (mesh axis `tensor`) and, of each
row, its own queries, a contiguous piece (mesh axis `sequence`). A query may see any key before it,
so that a device needs the keys of whole rows: they are gathered over `sequence` ahead of the
product, and their gradients are summed and split again behind it. This is context parallelism by
all-gather, as Llama 3 has it (arXiv 2407.21783, section 3.3.2).

What travels is whatever keys and values are made of: with grouped heads these themselves, with
latent attention R + Hr numbers per token, of which every device makes the N (Hn + Hr + Hv) of its
heads by itself. Inside the map over devices, not before it: so the gradients that travel back are
those of the latents too.

Under a causal mask the pieces are unequal work: of s devices the last has (2 s - 1) / s of the
mean, and the others wait for it. `chunked` skips the blocks of earlier documents, so that documents
that are short against a row even it out; `splash` skips by place only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_jax.devices import partitioning

Array = jax.Array


class Source(NamedTuple):
  """What a device makes the keys and values of its heads from."""

  arrays: tuple[Array, ...]  # [B, L, Nkv, width], heads split, or [B, L, width], without heads
  make: Callable[..., tuple[Array, Array]]  # (*arrays of whole rows, *weights) -> (k, v)
  weights: tuple[Array, ...] = ()
  weight_axes: tuple[tuple[str | None, ...], ...] = ()  # logical axes of each


def attend(
  fn: Callable[..., Array], q: Array, source: Source, positions: Array, segment_ids: Array
) -> Array:
  """Calls an implementation of attention on every device for its part.

  Args:
    fn: (q, k, v, positions, segment_ids, first=...) -> out, as `reference.attend` has them.
    q: [B, L, N, H].
    source: of keys and values, for the same tokens.
    positions: [B, L] int32.
    segment_ids: [B, L] int32.

  Returns:
    [B, L, N, Hv].
  """
  heads, rows = ('act_batch', 'act_len', 'act_heads', None), ('act_batch', 'act_len')
  in_axes = [heads, rows, rows, *(heads if a.ndim == 4 else (*rows, None) for a in source.arrays)]

  def part(q: Array, *rest: Array) -> Array:
    count = 2 + len(source.arrays)
    whole = (partitioning.gather_over('act_len', a, axis=1) for a in rest[:count])
    positions, segment_ids, *arrays = whole
    k, v = source.make(*arrays, *rest[count:])
    first = partitioning.first_index('act_len', q.shape[1])
    return fn(q, k, v, positions, segment_ids, first=first)

  mapped = partitioning.per_shard(part, (*in_axes, *source.weight_axes), heads)
  return mapped(q, positions, segment_ids, *source.arrays, *source.weights)
