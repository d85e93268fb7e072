"""Fast paths on this very device against float32, before anybody believes their times.

Errors are the largest difference over the largest magnitude of the reference. Inputs are of 16 bits
on both sides, so that what is left is the rounding of results, 2^-9, and of what is rounded on the
way: probabilities, activations, gradients of scores.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import gpu_kernels, gpu_sizes
from experiments.common import harness
from moe_jax.models.attention.kernels import latent_decode, reference
from moe_jax.models.dispatch import DISPATCHES
from moe_jax.models.experts import grouped_kernels
from moe_jax.training import cross_entropy as cross_entropy_lib

Array = jax.Array
ROWS, WIDE, NARROW, EXPERTS = 1024, 256, 128, 8
PRODUCT, CHAIN = 2**-7, 2**-5  # of a rounded product; of a few in a row
SIZES = {
  'first, middle and last empty': (0, 300, 200, 0, 1, 23, 500, 0),
  'one row each': (1, 1, 1, 1, 1, 1, 1, 1017),
  'all on one': (0, 0, 0, 1024, 0, 0, 0, 0),
  'even': (128,) * 8,
}


def run(sizes: gpu_sizes.Sizes, unused_peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """All checks, each {name, error, tolerance, passed}."""
  yield from _legs(sizes)
  yield from _layer(sizes)
  yield from _attention(sizes)
  yield from _latent_decode()
  yield _head_loss()


def verdict(name: str, got: Any, want: Any, tolerance: float) -> dict[str, Any]:
  """Compares trees of arrays; what is not finite has failed."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    error = np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30)
    worst = max(worst, float(error) if np.isfinite(error) else float('inf'))
  return {'name': name, 'error': worst, 'tolerance': tolerance, 'passed': worst <= tolerance}


def by_loop(x: Array, g: Array, w: Array, counts: Sequence[int]) -> tuple[np.ndarray, ...]:
  """The three legs expert by expert in float64 numpy."""
  x, g, w = (np.asarray(a, np.float64) for a in (x, g, w))
  gmm, gmm_t = np.zeros((len(x), w.shape[2])), np.zeros((len(x), w.shape[1]))
  tgmm, start = np.zeros(w.shape), 0
  for expert, count in enumerate(counts):
    rows = slice(start, start + count)
    gmm[rows], gmm_t[rows] = x[rows] @ w[expert], g[rows] @ w[expert].T
    tgmm[expert] = x[rows].T @ g[rows]
    start += count
  return gmm, gmm_t, tgmm


def _legs(sizes: gpu_sizes.Sizes) -> Iterator[dict[str, Any]]:
  normal = gpu_kernels.normal
  x, g, w = normal(1, ROWS, WIDE), normal(2, ROWS, NARROW), normal(3, EXPERTS, WIDE, NARROW)
  for kernel in sizes.kernels:
    backend = grouped_kernels.tokamax_products((kernel,), (kernel,))
    legs = jax.jit(
      lambda x, g, w, n, b=backend: (b.gmm(x, w, n), b.gmm_t(g, w, n), b.tgmm(x, g, n))
    )
    for case, counts in SIZES.items():
      got = legs(x, g, w, jnp.array(counts, jnp.int32))
      name = f'legs, {kernel}, {case}'
      yield verdict(name, got, by_loop(x, g, w, counts), PRODUCT)
      empty = np.asarray(got[2], np.float32)[np.array(counts) == 0]
      yield verdict(f'{name}: empty groups are 0', empty, np.zeros_like(empty), 0.0)


def _layer(sizes: gpu_sizes.Sizes) -> Iterator[dict[str, Any]]:
  """Dispatch by the kernels of the platform against every expert on every token, in float32."""
  normal, k, tokens = gpu_kernels.normal, 4, 512
  x, d_out = normal(1, tokens, WIDE), normal(2, tokens, WIDE)
  gates = jax.random.uniform(jax.random.key(3), (tokens, k))
  weights = normal(4, EXPERTS, WIDE, 2, NARROW) / 16, normal(5, EXPERTS, NARROW, WIDE) / 16

  def both(name, dtype):
    def apply(x, gates, gate_up, down, idx):
      return DISPATCHES[name](x, gates, idx, gate_up, down, 'auto', 0)

    def run(idx, d_out, x, gates, *weights):
      out, pullback = jax.vjp(lambda *a: apply(*a, idx), x, gates, *weights)
      return out, pullback(d_out)

    def cast(a):
      return a.astype(dtype)

    return lambda idx: jax.jit(run)(idx, cast(d_out), cast(x), gates, *map(cast, weights))

  fast, slow = both('dropless', jnp.bfloat16), both('dense', jnp.float32)
  for case in sizes.routings:
    idx = jnp.asarray(gpu_sizes.routing(case, tokens, EXPERTS, k))
    with jax.default_matmul_precision('highest'):
      want = slow(idx)
    yield verdict(f'layer, forward and backward, {case}', fast(idx), want, CHAIN)


def _attention(sizes: gpu_sizes.Sizes) -> Iterator[dict[str, Any]]:
  """Packed rows, of a length that is no multiple of a block."""
  small = dataclasses.replace(sizes, rows=2, length=300, heads=2)
  inputs = gpu_kernels.attention_inputs(small)
  q, k, v, d_out, positions, ids = inputs
  full = (*(a.astype(jnp.float32) for a in (q, k, v, d_out)), positions, ids)
  with jax.default_matmul_precision('highest'):
    want = jax.jit(gpu_kernels.forward_and_backward(reference.attend))(*full)
  for variant, fn in gpu_kernels.flash_variants(small).items():
    got = jax.jit(gpu_kernels.forward_and_backward(fn))(*inputs)
    yield verdict(f'attention, forward and backward, {variant}', got, want, CHAIN)


def _latent_decode() -> Iterator[dict[str, Any]]:
  """One token per row against a cache, at positions of all kinds; a GPU's kernel against XLA."""
  on_gpu, normal = jax.default_backend() == 'gpu', gpu_kernels.normal
  width, rope = gpu_kernels.LATENT, gpu_kernels.ROPE
  for heads, slots in ((5, 700), (16, 4096), (128, 1000)):
    positions = jnp.array([0, 63, 64, slots // 2, slots - 1], jnp.int32)
    rows = len(positions)
    args = normal(1, rows, heads, width), normal(2, rows, heads, rope)
    args += normal(3, rows, slots, width), normal(4, rows, slots, rope), positions
    scale = (width + rope) ** -0.5
    fast = functools.partial(latent_decode.attend, scale=scale, interpret=not on_gpu)
    with jax.default_matmul_precision('highest'):
      want = jax.jit(functools.partial(latent_decode.reference, scale=scale))(*args)
    name = f'latent decode, {heads} heads, {slots} slots'
    yield verdict(name, jax.jit(fast)(*args), want, CHAIN)


def _head_loss() -> dict[str, Any]:
  x, head = gpu_kernels.normal(1, 1, 96, WIDE), gpu_kernels.normal(2, WIDE, 1000) / 16
  targets = jnp.asarray(np.random.default_rng(0).integers(-1, 1000, size=(1, 96)), jnp.int32)

  def ours(x, head):
    return cross_entropy_lib.head_loss(x, head, targets, chunk=40, z_weight=1e-3).total

  def plain(x, head):
    cross_entropy, z = cross_entropy_lib.next_token(x @ head, targets)
    return cross_entropy + 1e-3 * z

  got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, head)
  with jax.default_matmul_precision('highest'):
    fn = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))
    want = fn(x.astype(jnp.float32), head.astype(jnp.float32))
  return verdict('head loss and its gradients', got, want, CHAIN)
