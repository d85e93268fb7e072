"""How scores become outputs: one function each, entered in `ATTENDS`, and `choose` between them.

All of them compute the same thing for real tokens, causal self-attention inside each document of a
packed row; they differ in the memory they need and in the platforms they run on. Their arguments
are those of `reference.attend`. Each runs on one device; `sharded.attend` gives every device of a
mesh its part.

  reference    all scores at once; short rows anywhere
  short        the same in blocks, laid out for XLA's products on a CPU; rows of 64 to 256 tokens
  chunked      memory linear in L, in plain JAX; long rows on CPU, and where no kernel serves
  dot_product  `jax.nn.dot_product_attention`; cuDNN on an NVIDIA GPU, whole rows
  tokamax      Mosaic and Triton kernels; NVIDIA GPU only
  splash       a Pallas kernel; TPU only
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import errors
from moe_jax.devices import hardware, partitioning
from moe_jax.models.attention.kernels import (
  chunked,
  dot_product,
  reference,
  short,
  splash,
  tokamax,
)

ATTENDS: dict[str, Callable[..., jax.Array]] = {
  'reference': reference.attend,
  'short': short.attend,
  'chunked': chunked.attend,
  'dot_product': dot_product.attend,
  'splash': splash.attend,
  'tokamax': tokamax.attend,
}
# Row lengths from which 'auto' prefers `short` and `chunked` to `reference`. On a CPU core with
# gradients, milliseconds of CPU time for 8 heads (`reference`, `short`, `chunked`): 49, 12, 20 for
# rows of 256 tokens and 297, 98, 98 for rows of 512; 2.9, 1.5, 1.9 for 4 heads and 64 tokens, and
# 0.9, -, 0.8 for 32. On a GPU it is a bound on memory, not a measurement: 16 MiB of scores per head
# and row.
SHORT_ON_CPU, LONG_ON_CPU, LONG_ELSEWHERE = 64, 257, 2048


def choose(
  name: str, *, head_dim: int, v_head_dim: int, length: int, dtype: jnp.dtype | str
) -> str:
  """The key of `ATTENDS` for `config.model.attention.impl`; 'auto' asks platform and shape.

  Platform and axes are those of the mesh in force; without one it is the default device. 'auto'
  takes `splash` on a TPU, unless the axis `sequence` splits rows into parts that are no multiples
  of its blocks. On a GPU in 16 bits it takes `tokamax` where cuDNN would have to pad values to the
  width of keys, or hold a mask of a long row, and where rows are split; `dot_product` where cuDNN
  runs it otherwise. Else `chunked` for long rows, `reference` for short ones, but on a CPU `short`
  from 64 tokens on.

  Args:
    name: a key of `ATTENDS`, or 'auto'.
    head_dim: H, of queries and keys.
    v_head_dim: Hv, of values.
    length: L, tokens of a row.
    dtype: of queries, keys and values.

  Raises:
    errors.InputError: there is no such name, or it cannot run on this platform or mesh.
  """
  errors.choice('model.attention.impl', name, ('auto', *ATTENDS))
  if name == 'splash':
    splash.require_tpu()
    splash.require_split(length)
  if name in ('dot_product', 'short'):
    _require_whole_rows(name)
  if name == 'tokamax':
    tokamax.require_gpu()
  if name != 'auto':
    return name
  platform = hardware.platform()
  if platform == 'tpu' and splash.splits(length):
    return 'splash'
  whole = partitioning.axis_size('sequence') == 1
  spares = head_dim != v_head_dim or length >= LONG_ELSEWHERE or not whole
  if spares and tokamax.runs(dtype):
    return 'tokamax'
  if whole and dot_product.cudnn_runs(head_dim, v_head_dim, dtype):
    return 'dot_product'
  return _plain(platform, length, whole)


def _plain(platform: str, length: int, whole: bool) -> str:
  """Of the implementations without a kernel, by length; `whole`: no device has part of a row."""
  on_cpu = platform == 'cpu'
  if length >= (LONG_ON_CPU if on_cpu else LONG_ELSEWHERE):
    return 'chunked'
  return 'short' if on_cpu and whole and length >= SHORT_ON_CPU else 'reference'


def _require_whole_rows(name: str):
  """Refuses meshes that split the queries of a row."""
  ways = partitioning.axis_size('sequence')
  errors.require(
    ways == 1,
    f'config.model.attention.impl={name!r} attends with whole rows, and config.mesh.sequence='
    f"{ways} splits them; set it to 'auto', or to 'chunked' for long rows",
  )
