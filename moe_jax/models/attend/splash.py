"""Splash attention, JAX's flash attention kernel for TPU (Pallas): memory linear in L.

Blocks of keys after a block of queries are skipped, those of other documents are not. The kernel
takes grouped heads and Hv != H as they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from moe_jax import errors, partitioning
from moe_jax.models.attend import target

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
  interpret: bool = False,
) -> Array:
  """Causal grouped self-attention; arguments and result as in `reference.attend`.

  `interpret` runs the kernel's text without a TPU, for tests: hundreds of times slower.

  Raises:
    errors.InputError: the platform is not a TPU.
  """
  del positions  # row order says the same
  if not interpret:
    require_tpu()
  shards = partitioning.over_row_shards(
    functools.partial(_attend, scale, interpret), num_row_args=4
  )
  return shards(q, k, v, segment_ids)


def require_tpu():
  """Refuses platforms that cannot run the kernel.

  Raises:
    errors.InputError: names the platform and what runs there.
  """
  platform = target.platform()
  errors.require(
    platform == 'tpu',
    f"config.model.attention.impl='splash' is a TPU kernel, and the platform is {platform!r}; "
    "set it to 'auto', or to 'chunked' for long rows",
  )


def _attend(
  scale: float, interpret: bool, q: Array, k: Array, v: Array, segment_ids: Array
) -> Array:
  length = q.shape[1]
  padded = length + -length % LANES
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel knows no scale
  pad = lambda a: jnp.pad(a, [(0, 0), (0, padded - length), *[(0, 0)] * (a.ndim - 2)])
  heads_first = lambda a: pad(a).swapaxes(1, 2)
  ids = pad(segment_ids)
  kernel = _kernel(q.shape[2], padded, interpret)
  # Padding sees padding, so that no query is left without a key.
  out = jax.vmap(kernel)(*map(heads_first, (q, k, v)), splash_attention_kernel.SegmentIds(ids, ids))
  return out.swapaxes(1, 2)[:, :length]


def _kernel(
  num_heads: int, length: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
  """([N, L, H], [Nkv, L, H], [Nkv, L, Hv], segment ids) -> [N, L, Hv]."""
  block = next(size for size in BLOCKS if length % size == 0)
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
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name='attn_out',  # of the outputs and the logs of the softmax sums
    interpret=interpret,
  )
