"""`jax.nn.dot_product_attention`: cuDNN's flash attention on an NVIDIA GPU, XLA elsewhere.

cuDNN never holds scores of every head. Packed documents reach it as a [B, 1, L, L] mask, so that
memory still grows with L squared, but once for all heads and in the dtype of the inputs.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.devices import hardware

Array = jax.Array

AMPERE, HOPPER = (8, 0), (9, 0)


def attend(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  segment_ids: Array,
  scale: float,
  first: Array | int = 0,
) -> Array:
  """Causal grouped self-attention; arguments and result as in `reference.attend`.

  Queries and keys are of the same tokens: `choose` refuses meshes that split queries.
  """
  del positions, first  # row order says the same
  length, (h, v_dim) = q.shape[1], (q.shape[-1], v.shape[-1])
  cudnn = cudnn_runs(h, v_dim, q.dtype)
  # Queries, keys and values must be equally wide: zeros leave the logits as they are, and outputs
  # of zeros are cut off. cuDNN asks for a multiple of 8, and with a mask for an even length.
  width, fill = max(h, v_dim), length % 2 if cudnn else 0
  width += -width % 8 if cudnn else 0

  def pad(a):
    return jnp.pad(a, ((0, 0), (0, fill), (0, 0), (0, width - a.shape[-1])))

  out = jax.nn.dot_product_attention(
    *map(pad, (q, k, v)),
    mask=_mask(jnp.pad(segment_ids, ((0, 0), (0, fill)))),
    scale=scale,
    implementation='cudnn' if cudnn else 'xla',
  )
  return checkpoint_name(out[:, :length, :, :v_dim], 'attn_out')


def cudnn_runs(head_dim: int, v_head_dim: int, dtype: jnp.dtype | str) -> bool:
  """Whether cuDNN's flash attention serves these sizes here: 16 bits, Ampere; above 128 Hopper."""
  if hardware.platform() != 'gpu' or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return False
  gpu, width = hardware.compute_capability(), max(head_dim, v_head_dim)
  return gpu >= HOPPER and width <= 256 or gpu >= AMPERE and width <= 128


def _mask(segment_ids: Array) -> Array:
  """[B, L] -> [B, 1, L, L] bool. Padding sees padding, so that no query is left without a key."""
  row = jnp.arange(segment_ids.shape[1])
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return (same & (row[:, None] >= row))[:, None]
