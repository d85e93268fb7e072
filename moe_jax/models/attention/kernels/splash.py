"""Splash attention, JAX's flash attention kernel for TPU (Pallas): memory linear in L.

Blocks of keys after a block of queries are skipped, those of other documents are not. The kernel
takes grouped heads and Hv != H as they are.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from moe_jax import errors
from moe_jax.devices import hardware, partitioning

Array = jax.Array

LANES = 128  # blocks are multiples of it
BLOCKS = (512, 256, LANES)  # of queries and of keys; the first that divides the padded length


def attend(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  segment_ids: Array,
  scale: float,
  first: Array | int = 0,
  interpret: bool = False,
) -> Array:
  """Causal grouped self-attention; arguments and result as in `reference.attend`.

  `interpret` runs the kernel's text without a TPU, for tests: hundreds of times slower.

  Raises:
    errors.InputError: the platform is not a TPU, or a part of a row is no multiple of `LANES`.
  """
  del positions  # row order says the same
  length, total = q.shape[1], k.shape[1]
  if not interpret:
    require_tpu()
  require_split(total)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel knows no scale

  def heads_first(a):
    return _padded(a).swapaxes(1, 2)

  ids = _padded(segment_ids)
  own = ids if length == total else jax.lax.dynamic_slice_in_dim(ids, first, length, axis=1)
  kernel = _kernel(q.shape[2], ids.shape[1], total // length, interpret)
  kernel = _part(kernel, total // length, first // length)
  # Padding sees padding, so that no query is left without a key.
  segments = splash_attention_kernel.SegmentIds(own, ids)
  out = cast(Array, jax.vmap(kernel)(*map(heads_first, (q, k, v)), segments))
  return out.swapaxes(1, 2)[:, :length]


def splits(length: int) -> bool:
  """Whether the kernel can take rows of this length in as many parts as the mesh splits them."""
  ways = partitioning.axis_size('sequence')
  return ways == 1 or length % (ways * LANES) == 0


def require_split(length: int):
  """Refuses rows whose parts are no whole blocks.

  Raises:
    errors.InputError: names length and axis.
  """
  ways = partitioning.axis_size('sequence')
  errors.require(
    splits(length),
    f"config.model.attention.impl='splash' takes parts of rows that are multiples of {LANES} "
    f'tokens, and config.model.max_seq_len={length} over config.mesh.sequence={ways} gives '
    f"{length / ways:g}; make it a multiple of {ways * LANES}, or set impl to 'auto' or 'chunked'",
  )


def require_tpu():
  """Refuses platforms that cannot run the kernel.

  Raises:
    errors.InputError: names the platform and what runs there.
  """
  platform = hardware.platform()
  errors.require(
    platform == 'tpu',
    f"config.model.attention.impl='splash' is a TPU kernel, and the platform is {platform!r}; "
    "set it to 'auto', or to 'chunked' for long rows",
  )


def _padded(a: Array) -> Array:
  """[B, length, ...] -> [B, a multiple of LANES, ...]."""
  return jnp.pad(a, [(0, 0), (0, -a.shape[1] % LANES), *[(0, 0)] * (a.ndim - 2)])


def _kernel(
  num_heads: int, length: int, ways: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
  """([N, L, H], [Nkv, S, H], [Nkv, S, Hv], segment ids) -> [N, L, Hv], S = length = ways * L."""
  block = next(size for size in BLOCKS if length // ways % size == 0)
  causal = splash_attention_mask.CausalMask((length, length))
  return splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([causal] * num_heads),
    # Not the fused backward kernel: it holds a gradient of all queries for every block of keys.
    block_sizes=splash_attention_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,  # these are the heads of one device
    q_seq_shards=ways,
    residual_checkpoint_name='attn_out',  # of the outputs and the logs of the softmax sums
    interpret=interpret,
  )


def _part(
  kernel: splash_attention_kernel.SplashAttentionKernel, ways: int, index: Array | int
) -> splash_attention_kernel.SplashAttentionKernel:
  """The kernel for part `index` of the queries: its rows of the tables of what block sees what.

  Axes are those of the kernel's `manual_sharding_spec`, which is for kernels that are arguments of
  a map over devices; this one is made inside of one.
  """
  if ways == 1:
    return kernel

  def cut(a: Array) -> Array:
    axis = 0 if a.ndim == 1 else 1  # places of the queries [S]; tables [heads, blocks, blocks]
    size = a.shape[axis] // ways
    return jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)

  return jax.tree.map(cut, kernel)
