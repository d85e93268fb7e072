"""Latent attention of one new token per row that reads the cache once: a Pallas kernel for GPUs.

The absorbed form (`latent.absorbed`) multiplies with the latents twice, for scores and values; as
two products that is two passes over the cache, whose bytes are all that decoding waits for. Here a
block of latents is loaded once and serves both, with a running softmax. The context of a row is cut
into splits that different multiprocessors take, and their partial sums are merged by the logarithm
of their sums (flash-decoding). Slots behind a row's position are never loaded.

Axis letters are those of `moe_jax.models`; S are slots of the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.devices import hardware

Array = jax.Array

BLOCK = 64  # slots that are loaded at once: 64 KiB of latents of width 512 in 16 bits
MOST_HEADS = 32  # of a program: their float32 sums, 512 wide, are a quarter of the registers
LEAST_HEADS = 16  # rows of the smallest product of the tensor cores
PROGRAMS = 264  # to be had: two for each multiprocessor of an H100 or H200


def suits(width: int, rope_width: int, dtype: jnp.dtype) -> bool:
  """Whether the kernel's products take these widths (Triton's are powers of two) and this dtype."""
  powers = all(n >= 16 and n & (n - 1) == 0 for n in (width, rope_width))
  return powers and dtype in (jnp.bfloat16, jnp.float16)


def serves(impl: str, latent: Array, rope_key: Array) -> bool:
  """Whether `attend` takes this cache where the program will run: on one NVIDIA GPU.

  Args:
    impl: `model.attention.impl`; 'reference' asks for plain XLA.
    latent: [B, S, R].
    rope_key: [B, S, Hr].
  """
  alone = jax.sharding.get_abstract_mesh().size <= 1
  fits = suits(latent.shape[-1], rope_key.shape[-1], latent.dtype)
  return impl != 'reference' and hardware.platform() == 'gpu' and alone and fits


def num_splits(programs: int, num_slots: int) -> int:
  """Splits: enough to fill the device, each of four blocks or more."""
  return max(1, min(-(-PROGRAMS // programs), num_slots // (4 * BLOCK)))


def attend(
  q_latent: Array,
  q_rope: Array,
  latent: Array,
  rope_key: Array,
  positions: Array,
  scale: float,
  *,
  splits: int = 0,
  interpret: bool = False,
) -> Array:
  """The sum of the latents that each query sees, weighted by its softmax.

  Args:
    q_latent: [B, N, R], queries with W^UK applied.
    q_rope: [B, N, Hr], their rotated parts.
    latent: [B, S, R], the cache.
    rope_key: [B, S, Hr].
    positions: [B] int32: a row sees the slots up to its position.
    scale: of the scores.
    splits: parts of a context; 0 = what fills the device.
    interpret: run on any platform, for tests.

  Returns:
    [B, N, R] in the dtype of the cache.
  """
  (batch, num_heads, width), num_slots = q_latent.shape, latent.shape[1]
  heads = LEAST_HEADS if num_heads <= LEAST_HEADS else MOST_HEADS

  def pad(q):
    return jnp.pad(q, ((0, 0), (0, -num_heads % heads), (0, 0))).astype(latent.dtype)

  q_latent, q_rope = pad(q_latent), pad(q_rope)
  groups = q_latent.shape[1] // heads
  splits = splits or num_splits(batch * groups, num_slots)
  part = -(-num_slots // (splits * BLOCK)) * BLOCK  # slots of a split

  def query(size):
    return pl.BlockSpec((None, heads, size), lambda b, n, g: (b, n, 0))

  def cached(size):
    return pl.BlockSpec((None, part, size), lambda b, n, g: (b, g, 0))

  partial = pl.BlockSpec((None, None, heads), lambda b, n, g: (b, g, n))
  wide = pl.BlockSpec((None, None, heads, width), lambda b, n, g: (b, g, n, 0))
  shape = (batch, splits, groups * heads)

  def f32(*size):
    return jax.ShapeDtypeStruct((*shape, *size), jnp.float32)

  sums, top, total = pl.pallas_call(
    functools.partial(_kernel, part, num_slots, scale),
    grid=(batch, groups, splits),
    in_specs=[
      pl.BlockSpec((1,), lambda b, n, g: (b,)),
      *(query(width), query(q_rope.shape[-1])),
      *(cached(width), cached(rope_key.shape[-1])),
    ],
    out_specs=[wide, partial, partial],
    out_shape=[f32(width), f32(), f32()],
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
    interpret=interpret,
    name='latent_decode',
  )(positions, q_latent, q_rope, latent, rope_key)
  # A split without a slot that is seen has top -inf and weighs nothing; the first one always has.
  weight = jnp.exp(top - top.max(axis=1, keepdims=True))
  merged = (sums * weight[..., None]).sum(axis=1) / (total * weight).sum(axis=1)[..., None]
  return merged[:, :num_heads].astype(latent.dtype)


def reference(
  q_latent: Array, q_rope: Array, latent: Array, rope_key: Array, positions: Array, scale: float
) -> Array:
  """The same in plain JAX, all scores at once and in float32; arguments as above."""

  def wide(a):
    return a.astype(jnp.float32)

  scores = jnp.einsum('BNR,BSR->BNS', wide(q_latent), wide(latent))
  scores = (scores + jnp.einsum('BNH,BSH->BNS', wide(q_rope), wide(rope_key))) * scale
  seen = jnp.arange(latent.shape[1]) <= positions[:, None, None]
  probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  return jnp.einsum('BNS,BSR->BNR', probs, wide(latent)).astype(latent.dtype)


def _kernel(
  part: int,
  num_slots: int,
  scale: float,
  position_ref,
  q_latent_ref,
  q_rope_ref,
  latent_ref,
  rope_key_ref,
  sums_ref,
  top_ref,
  total_ref,
):
  """One row, some of its heads, one split of its context."""
  first = pl.program_id(2) * part
  end = jnp.minimum(jnp.minimum(position_ref[0] + 1, num_slots) - first, part)  # in the split
  q_latent, q_rope = q_latent_ref[...], q_rope_ref[...]
  heads, width = q_latent.shape

  def block(i, carry):
    sums, top, total = carry
    slots = pl.ds(i * BLOCK, BLOCK)
    seen = i * BLOCK + jnp.arange(BLOCK) < end

    def load(ref):
      return triton.load(ref.at[slots, :], mask=seen[:, None], other=0)

    latent, rope_key = load(latent_ref), load(rope_key_ref)
    scores = (triton.dot(q_latent, latent.T) + triton.dot(q_rope, rope_key.T)) * scale
    scores = jnp.where(seen[None], scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1))  # finite: a block that is visited has a slot
    probs = jnp.exp(scores - new_top[:, None])
    shrink = jnp.exp(top - new_top)
    sums = sums * shrink[:, None] + triton.dot(probs.astype(latent.dtype), latent)
    return sums, new_top, total * shrink + probs.sum(axis=1)

  carry = (
    jnp.zeros((heads, width), jnp.float32),
    jnp.full((heads,), -jnp.inf, jnp.float32),
    jnp.zeros((heads,), jnp.float32),
  )
  num_blocks = pl.cdiv(jnp.maximum(end, 0), BLOCK)
  sums, top, total = jax.lax.fori_loop(0, num_blocks, block, carry)
  sums_ref[...], top_ref[...], total_ref[...] = sums, top, total
