"""Single kernels on a GPU: grouped products, plan and gathers, attention, loss, a step's cache."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import gpu_sizes
from experiments.common import harness
from moe_jax.models.attention import kernels, latent
from moe_jax.models.attention.kernels import tokamax
from moe_jax.models.experts import grouped_kernels, sorted_plan
from moe_jax.training import cross_entropy

Array = jax.Array
MLA_DIMS = (192, 128)  # of queries and keys, and of values
LATENT, ROPE = 512, 64  # widths of MLA's cache
INPUTS = 3  # sets that calls take in turn: caches stay cold, and nothing can be left out


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> Array:
  """Random numbers of size 1."""
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def program(
  name: str, variant: str, fn: Callable, inputs: Sequence[tuple], sizes: gpu_sizes.Sizes, **about
) -> harness.Program:
  """A jitted function as a program that launches it several times per call."""
  compiled = jax.jit(fn).lower(*inputs[0]).compile()
  flops, num_bytes = about.pop('flops', 0.0), about.pop('num_bytes', 0.0)

  def launch(number: int) -> list[Any]:
    first = number * sizes.launches
    return [compiled(*inputs[(first + i) % len(inputs)]) for i in range(sizes.launches)]

  return harness.Program(
    name,
    variant,
    launch,
    flops=flops * sizes.launches,
    bytes=num_bytes * sizes.launches,
    peak_bytes=harness.temporaries(compiled),
    **about,
  )


def prepare(*args: Any, **about: Any) -> Callable[[], harness.Program]:
  """`program` with these arguments, to be made by `measured`."""
  return functools.partial(program, *args, **about)


def measured(
  makers: Sequence[Callable[[], harness.Program]], sizes: gpu_sizes.Sizes, peaks: harness.Peaks
) -> Iterator[dict[str, Any]]:
  """Makes programs (see `prepare`) and times them; seconds are those of one launch.

  A program that cannot be made is a result that says so: a kernel's limits are a finding.
  """
  programs = []
  for make in makers:
    try:
      programs.append(make())
    except Exception as e:  # whatever a library raises
      what = [repr(a) for a in getattr(make, 'args', ())[:2]]
      yield {'name': ', '.join(what), 'failed': f'{type(e).__name__}: {e}'[:2000]}
  for result, one in zip(harness.measure('gpu', programs, sizes.repeats, peaks), programs):
    times = ('seconds_median', 'seconds_min', 'seconds_max')
    scaled = {field: getattr(result, field) / sizes.launches for field in times}
    seconds = result.seconds_median
    rates = {'tflops': one.flops / seconds / 1e12, 'gigabytes': one.bytes / seconds / 1e9}
    detail = result.detail | {k: round(v, 1) for k, v in rates.items() if v}
    if one.flops:
      detail['share_of_matmul_peak'] = one.flops / seconds / peaks.flops
    if one.bytes:
      detail['share_of_copy_bandwidth'] = one.bytes / seconds / peaks.bytes
    yield dataclasses.replace(result, **scaled, detail=detail).to_json()


def legs(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """Every grouped product of a layer by every kernel, balanced and with one hot expert."""
  rows, e, d, f = sizes.tokens * sizes.k, sizes.num_experts, sizes.embed_dim, sizes.mlp_dim
  counts = {
    case: jnp.bincount(gpu_sizes.routing(case, sizes.tokens, e, sizes.k).reshape(-1), length=e)
    for case in ('balanced', 'hot')
  }
  for product, (a, b) in {'gate_up': (d, 2 * f), 'down': (f, d)}.items():
    x = [normal(i, rows, a) for i in range(INPUTS)]
    g = [normal(i + 9, rows, b) for i in range(INPUTS)]
    w = normal(7, e, a, b)
    for leg, operands in {
      'gmm': [(x[i], w) for i in range(INPUTS)],
      'gmm_t': [(g[i], w) for i in range(INPUTS)],
      'tgmm': list(zip(x, g)),
    }.items():
      programs = []
      for kernel in sizes.kernels:
        backend = grouped_kernels.tokamax_products((kernel,), (kernel,))
        for case, n in counts.items():
          inputs = [(*pair, n.astype(jnp.int32)) for pair in operands]
          variant, fn = f'{kernel}, {case}', getattr(backend, leg)
          name = f'{leg} {product}'
          programs.append(prepare(name, variant, fn, inputs, sizes, flops=2.0 * rows * a * b))
      yield from measured(programs, sizes, peaks)


def dispatch(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """The plan of a layer, the gather of rows and the sum of each token's rows."""
  t, k, d, e = sizes.tokens, sizes.k, sizes.embed_dim, sizes.num_experts
  idx = [jnp.asarray(gpu_sizes.routing('zipf', t, e, k, seed)) for seed in range(INPUTS)]
  make = functools.partial(sorted_plan.make_plan, num_experts=e, align=1)
  plans = [jax.jit(make)(i) for i in idx]
  tokens = [(normal(i, t, d), plan) for i, plan in enumerate(plans)]
  rows = [(normal(i, t * k, d), plan) for i, plan in enumerate(plans)]
  moved = 2.0 * (t * k + t) * d  # bytes in 16 bits: the rows, and each token once
  yield from measured(
    [
      prepare('plan', 'sort, edges, inverse', make, [(i,) for i in idx], sizes),
      prepare(
        *('gather', 'rows of tokens'),
        lambda x, plan: sorted_plan.take(x, plan.row_choice // k),
        *(tokens, sizes),
        num_bytes=moved,
      ),
      prepare(
        *('combine', 'sum of rows'),
        lambda y, plan: sorted_plan.sum_rows(y, plan.choice_row),
        *(rows, sizes),
        num_bytes=moved,
      ),
    ],
    *(sizes, peaks),
  )


def flash_variants(sizes: gpu_sizes.Sizes) -> dict[str, Callable]:
  """Name -> attention that runs here."""
  found = {
    f'tokamax {name}': functools.partial(tokamax.attend, kernels=(name,)) for name in sizes.flash
  }
  return found | {name: kernels.ATTENDS[name] for name in ('dot_product', 'chunked')}


def attention_inputs(sizes: gpu_sizes.Sizes, seed: int = 0, dtype: Any = jnp.bfloat16) -> tuple:
  """(q, k, v, d_out, positions, segment_ids) of rows with two documents each."""
  b, length, n, (wide, narrow) = sizes.rows, sizes.length, sizes.heads, MLA_DIMS
  q, k = (normal(seed + i, b, length, n, wide, dtype=dtype) for i in range(2))
  v, d_out = (normal(seed + i, b, length, n, narrow, dtype=dtype) for i in (2, 3))
  cut = length // 3
  place = np.arange(length)
  positions = np.where(place < cut, place, place - cut)

  def spread(a):
    return jnp.asarray(np.broadcast_to(a, (b, length)), jnp.int32)

  return q, k, v, d_out, spread(positions), spread(np.where(place < cut, 1, 2))


def forward_and_backward(fn: Callable) -> Callable:
  """Attention `fn` -> (q, k, v, d_out, positions, segment_ids) -> (out, gradients)."""

  def run(q, k, v, d_out, positions, ids):
    out, pullback = jax.vjp(lambda *a: fn(*a, positions, ids, MLA_DIMS[0] ** -0.5), q, k, v)
    return out, pullback(d_out)

  return run


def attention_flops(sizes: gpu_sizes.Sizes) -> float:
  """Of the two products of the forward pass, over the keys that a query sees."""
  cut = sizes.length // 3
  pairs = sum(n * (n + 1) / 2 for n in (cut, sizes.length - cut))
  return 2.0 * sizes.rows * sizes.heads * pairs * sum(MLA_DIMS)


def attention_suite(sizes: gpu_sizes.Sizes) -> Iterator[Callable[[], harness.Program]]:
  """Forward, and with backward (three and a half times the FLOPs), of every variant."""
  inputs = [attention_inputs(sizes, 10 * i) for i in range(INPUTS)]
  flops = attention_flops(sizes)
  for variant, fn in flash_variants(sizes).items():

    def forward(q, k, v, d, p, i, fn=fn):
      return fn(q, k, v, p, i, MLA_DIMS[0] ** -0.5)

    yield prepare('attention forward', variant, forward, inputs, sizes, flops=flops)
    both = forward_and_backward(fn)
    yield prepare('attention fwd + bwd', variant, both, inputs, sizes, flops=3.5 * flops)


def flash(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """Attention at MLA's head sizes."""
  yield from measured(list(attention_suite(sizes)), sizes, peaks)


def head_loss(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """The loss over the vocabulary with both gradients: three products."""
  t, d, v = sizes.tokens, sizes.embed_dim, sizes.vocab_size

  def loss(x, w, y, chunk):
    return cross_entropy.head_loss(x, w, y, chunk=chunk, z_weight=1e-4).total

  rng = np.random.default_rng(0)
  targets = [jnp.asarray(rng.integers(v, size=(1, t)), jnp.int32) for _ in range(INPUTS)]
  head = normal(3, d, v, dtype=jnp.float32) / d**0.5
  inputs = [(normal(i, 1, t, d), head, y) for i, y in enumerate(targets)]
  programs = []
  for chunk in (sizes.chunk, 2 * sizes.chunk):
    fn = jax.value_and_grad(functools.partial(loss, chunk=chunk), argnums=(0, 1))
    about = dict(flops=6.0 * t * d * v)
    programs.append(prepare('head loss', f'tiles of {chunk}', fn, inputs, sizes, **about))
  yield from measured(programs, sizes, peaks)


def cache(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """A token's attention against MLA's cache; the bound is reading the cache once."""
  b, s, n, nope = sizes.cache_rows, sizes.cache_slots, sizes.heads, MLA_DIMS[1]

  def step(impl):
    settings = types.SimpleNamespace(softmax_scale=MLA_DIMS[0] ** -0.5, impl=impl)

    def run(q, rope, cached, up, positions):
      return latent.absorbed(latent.Queries(q, rope), cached, up, positions, settings)

    return run

  up = latent.Absorbed(normal(1, n, nope, LATENT), normal(2, n, LATENT, nope))
  positions = jnp.full((b, 1), s - 1, jnp.int32)
  inputs = []
  for i in range(2):  # each far larger than any cache of the chip
    cached = latent.LatentCache(normal(i, b, s, LATENT), normal(i + 5, b, s, ROPE))
    inputs.append((normal(i, b, 1, n, nope), normal(i, b, 1, n, ROPE), cached, up, positions))
  about = dict(num_bytes=2.0 * b * s * (LATENT + ROPE), flops=2.0 * b * s * n * (2 * LATENT + ROPE))
  variants = {'one pass': 'auto', 'XLA': 'reference'}
  programs = [
    prepare('MLA cache', name, step(impl), inputs, sizes, **about)
    for name, impl in variants.items()
  ]
  yield from measured(programs, sizes, peaks)
