"""tokamax's flash attention for NVIDIA GPUs: Mosaic from Hopper on, Triton elsewhere.

It takes grouped heads and Hv != H as they are, where cuDNN's public form pads values to the width
of keys. Packed documents reach it as the first key that each query sees, [B, 1, L]: with causality
that is all, and no mask of L x L numbers exists. Blocks of keys before it are skipped on the way
forward, blocks after a query in both directions.

Under a policy of `jax.checkpoint` that keeps the outputs, backward repeats the kernel all the same:
tokamax does not name the softmax sums that it needs. Chooses between kernels by name, and never the
library's default, which ends in scores of every head at once without a word.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import errors
from moe_jax.devices import hardware, tokamax_tiles

Array = jax.Array

KERNELS = ('mosaic_gpu', 'triton')  # first choice first
QUERIES = 128  # the kernels want multiples of it
AMPERE = (8, 0)


def attend(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  segment_ids: Array,
  scale: float,
  first: Array | int = 0,
  kernels: Sequence[str] = KERNELS,
) -> Array:
  """Causal grouped self-attention; arguments and result as in `reference.attend`.

  `kernels` are tokamax's names; those of KERNELS do not run on a CPU, 'xla' and 'xla_chunked' do.

  Raises:
    errors.InputError: the platform is not a GPU, or tokamax is not installed.
  """
  del positions  # row order says the same
  if set(kernels) <= set(KERNELS):
    require_gpu()
  library = tokamax_tiles.load("config.model.attention.impl='tokamax'")

  length, total = q.shape[1], k.shape[1]
  start = document_starts(segment_ids)
  end = jnp.arange(1, total + 1, dtype=jnp.int32)
  if length != total:  # a part of the queries
    start = jax.lax.dynamic_slice_in_dim(start, first, length, axis=1)
    end = jax.lax.dynamic_slice_in_dim(end, first, length)
  fill = -length % QUERIES
  # Queries that fill up see the last key, so that none is left without one.
  start = jnp.pad(start, ((0, 0), (0, fill)), constant_values=total - 1)[:, None]
  end = jnp.pad(end, (0, fill), constant_values=total)
  bounds = dict(k_start=start) if length == total else dict(k_start=start, k_end=end)
  out = library.dot_product_attention(
    jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0))),
    k,
    v,
    scale=scale,
    is_causal=length == total,
    implementation=tuple(_kernel(name, bounds) for name in kernels),
  )
  return checkpoint_name(out[:, :length].astype(v.dtype), 'attn_out')


def document_starts(segment_ids: Array) -> Array:
  """[B, S] int32 -> [B, S] int32: the place of the first token of each token's document.

  A padding token (0) is a document of its own. The tokens of a document are neighbours.
  """
  place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  new = (segment_ids != jnp.roll(segment_ids, 1, axis=1)) | (segment_ids == 0)
  return jax.lax.cummax(jnp.where(new, place, 0), axis=1)


def runs(dtype: jnp.dtype | str) -> bool:
  """Whether the kernels serve here: tokamax is installed, 16 bits, Ampere or later."""
  if hardware.platform() != 'gpu' or importlib.util.find_spec('tokamax') is None:
    return False
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  return half and hardware.compute_capability() >= AMPERE


def require_gpu():
  """Refuses platforms that cannot run the kernels.

  Raises:
    errors.InputError: names the platform and what runs there, or the missing package.
  """
  platform = hardware.platform()
  errors.require(
    platform == 'gpu',
    f"config.model.attention.impl='tokamax' is a kernel for NVIDIA GPUs, and the platform is "
    f"{platform!r}; set it to 'auto', or to 'chunked' for long rows",
  )
  tokamax_tiles.load("config.model.attention.impl='tokamax'")


def _kernel(name: str, bounds: dict[str, Array]) -> Callable[..., Array]:
  """One of tokamax's kernels, with bounds on the keys that its public function has no word for."""
  from tokamax._src.ops.attention import api

  def run(q: Array, k: Array, v: Array, *, mask: Any, **options: Any) -> Array:
    if name not in api.IMPLEMENTATIONS:  # newer releases leave Triton out without `jax-triton`
      # What tokamax's own kernels raise for what they cannot do: the next in the list is tried.
      raise NotImplementedError(f'this tokamax has no {name}')
    return api.IMPLEMENTATIONS[name](q, k, v, mask=mask & type(mask)(**bounds), **options)

  return run
