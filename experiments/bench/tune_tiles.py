"""The kernels that a model calls, and the measurement of their tiles."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import flags

from moe_jax import errors
from moe_jax.devices import tokamax_tiles
from moe_jax.models.attention.kernels import tokamax
from moe_jax.models.experts import grouped_kernels

MARK = 'tokamax:{'  # tokamax writes down in the program what a kernel is called with
KERNELS, FLASH = ('mosaic', 'triton'), ('mosaic_gpu', 'triton')


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Of one model on one device."""

  tokens: int  # of a forward pass
  embed_dim: int
  num_experts: int
  mlp_dim: int
  k: int
  heads: int
  length: int
  head_dims: tuple[int, int]  # of queries and keys, and of values


# Those of the pages deepseekmoe_16b (as the benchmark has it), deepseekmoe_2b with aligned experts,
# deepseek_v2_lite and a toy.
MODELS = {
  '16b': Shapes(16384, 2048, 64, 1408, 6, 16, 4096, (128, 128)),
  '2b': Shapes(65536, 1280, 63, 896, 7, 10, 2048, (128, 128)),
  'v2_lite': Shapes(16384, 2048, 64, 1408, 6, 16, 4096, (192, 128)),
}
TOY = {'toy': Shapes(128, 64, 4, 64, 2, 2, 128, (64, 64))}


def programs(
  models: dict[str, Shapes], products: Sequence[str], flash: Sequence[str]
) -> Iterator[tuple[str, Callable, tuple]]:
  """(name, function, abstract arguments) whose trace holds the kernels of a model."""

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

  for model, s in models.items():
    rows, sizes = s.tokens * s.k, array(s.num_experts, dtype=jnp.int32)
    for kernel in products:
      backend = grouped_kernels.tokamax_products((kernel,), (kernel,))
      for name, (a, b) in {
        'gate_up': (s.embed_dim, 2 * s.mlp_dim),
        'down': (s.mlp_dim, s.embed_dim),
      }.items():
        x, g, w = array(rows, a), array(rows, b), array(s.num_experts, a, b)
        yield f'{model} gmm {name} {kernel}', backend.gmm, (x, w, sizes)
        yield f'{model} gmm_t {name} {kernel}', backend.gmm_t, (g, w, sizes)
        yield f'{model} tgmm {name} {kernel}', backend.tgmm, (x, g, sizes)
    batch = max(1, s.tokens // s.length)
    wide, narrow = (array(batch, s.length, s.heads, h) for h in s.head_dims)
    ids = array(batch, s.length, dtype=jnp.int32)
    for kernel in flash:
      yield f'{model} attention {kernel}', _attention(kernel), (wide, wide, narrow, narrow, ids)


def _attention(kernel: str) -> Callable:
  """(q, k, v, d_out, segment_ids) -> outputs and gradients."""

  def run(q, k, v, d_out, ids):
    def fn(*a):
      return tokamax.attend(*a, ids, ids, q.shape[-1] ** -0.5, kernels=(kernel,))

    out, pullback = jax.vjp(fn, q, k, v)
    return out, pullback(d_out)

  return run


def calls(fn: Callable, args: tuple) -> list[Any]:
  """tokamax's `BoundArguments` of every kernel that a program calls, each once.

  Read from the trace: `tokamax.get_bound_args` reads them from lowered text, which release 0.0.12
  cannot with JAX 0.10.
  """
  from tokamax._src.ops import op

  found = {}
  for text in _notes(jax.make_jaxpr(fn)(*args).jaxpr):
    start = text.find(MARK)
    while start >= 0:
      spec, length = json.JSONDecoder().raw_decode(text[start + len(MARK) - 1 :])
      bound = op.BOUND_ARGS_ADAPTER.validate_python(spec)
      bound = op.BoundArguments(bound.op.replace(config=None), bound.arguments)
      found[type(bound.op).__name__, bound.autotuning_cache_key] = bound
      start = text.find(MARK, start + length)
  return list(found.values())


def _notes(jaxpr: Any) -> set[str]:
  """Names of all scopes in a program (where tokamax 0.0.12 writes) and its metadata (0.0.17)."""
  notes = set()
  for eqn in jaxpr.eqns:
    notes.add(str(eqn.source_info.name_stack))
    metadata = getattr(eqn.ctx, 'xla_metadata', None) or {}
    notes |= {str(value) for value in metadata.values()}
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        notes |= _notes(inner)
  return notes


def measure(
  wanted: Sequence[tuple[str, Callable, tuple]], path: pathlib.Path, seconds: float
) -> tuple[int, int]:
  """Measures what the file lacks until the time is over; (kernels measured, kernels left).

  Args:
    wanted: see `programs`.
    path: of the file, which is read first and written after every kernel.
    seconds: no kernel is begun after them.
  """
  import tokamax as library

  start, result = time.monotonic(), None
  if path.is_file():
    result = library.AutotuningResult.loads(path.read_text(encoding='utf-8'))
  has = {(type(b.op).__name__, b.autotuning_cache_key) for b, _ in (result.data if result else ())}
  missing = {}
  for name, fn, args in wanted:
    for bound in calls(fn, args):
      key = type(bound.op).__name__, bound.autotuning_cache_key
      if key not in has:
        missing.setdefault(key, (name, bound))
  done = 0
  for name, bound in tqdm.tqdm(missing.values(), desc='kernels', disable=None):
    if time.monotonic() - start > seconds:
      break
    made = library.autotune([bound], progress_bar=False)
    errors.require(bool(made.data), f'no choice of tiles worked for {name}; see the log above')
    result = made if result is None else result | made
    whole = path.with_suffix('.new')
    whole.parent.mkdir(parents=True, exist_ok=True)
    whole.write_text(result.dumps(), encoding='utf-8')
    os.replace(whole, path)
    done += 1
  return done, len(missing) - done


def main(unused_argv: Sequence[str]):
  """Measures and says what is left."""
  args, platform = flags.FLAGS, jax.default_backend()
  errors.require(
    args.toy or platform == 'gpu',
    f'JAX runs on {platform!r} here, and tiles are measured on the GPU that they are for; add '
    '--toy to try the command',
  )
  models, products, flash = (TOY, ('xla',), ()) if args.toy else (MODELS, KERNELS, FLASH)
  wanted = [p for p in programs(models, products, flash) if all(w in p[0] for w in args.only)]
  errors.require(bool(wanted), f'--only={",".join(args.only)} names no program')
  path = tokamax_tiles.path_of(
    jax.devices()[0].device_kind, pathlib.Path(args.out or tokamax_tiles.DIRECTORY)
  )
  done, left = measure(wanted, path, 60 * args.minutes)
  print(f'{done} kernels measured, {left} left: {path}')
