"""Grouped matrix products: every group of rows times its own expert's matrix, behind one table.

A backend is three legs over the same layout (see `plan.Plan`), R rows in E groups:

  gmm    x [R, A], w [E, A, B]      -> [R, B]      forward
  gmm_t  g [R, B], w [E, A, B]      -> [R, A]      gradient of the rows
  tgmm   x [R, A], g [R, B]         -> [E, A, B]   gradient of the weights; 0 for an empty group

`group_sizes` [E] are multiples of `align`. Rows past their sum are zeros on the way in; what comes
back there is undefined.

`jax.lax.ragged_dot` lowers to a grouped kernel on TPU for the rows, but to a masked dense product
(E times the work) for the weights, and for everything on CPU and GPU. So the table never chooses it
there, and on TPU takes JAX's megablox kernel for the weights.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm as megablox_tgmm

from moe_jax import errors
from moe_jax.models import target

Array = jax.Array
Leg = Callable[[Array, Array, Array], Array]

LANES = 128  # of a TPU's registers
BLOCK = 64  # rows per block on CPU: best of 32, 64 and 128 for both 128- and 512-wide models


class Backend(NamedTuple):
  """Three legs and the row alignment they ask for."""

  name: str
  align: int
  gmm: Leg
  gmm_t: Leg
  tgmm: Leg


def _for_each_block(group_sizes: Array, num_rows: int, body: Callable, init: Array) -> Array:
  """Runs body(first_row, expert, carry) over the blocks in use; the trip count is dynamic."""
  end = jnp.cumsum(group_sizes) // BLOCK
  blocks = jnp.arange(num_rows // BLOCK, dtype=jnp.int32)
  expert = jnp.minimum(jnp.searchsorted(end, blocks, side='right'), len(group_sizes) - 1)
  return jax.lax.fori_loop(0, end[-1], lambda i, out: body(i * BLOCK, expert[i], out), init)


def _rows(x: Array, start: Array) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, start, BLOCK)


def _blocks_gmm(x: Array, w: Array, group_sizes: Array) -> Array:
  def body(start, expert, out):
    block = _rows(x, start) @ w[expert]
    return jax.lax.dynamic_update_slice_in_dim(out, block, start, 0)

  return _for_each_block(group_sizes, len(x), body, jnp.zeros((len(x), w.shape[2]), x.dtype))


def _blocks_gmm_t(g: Array, w: Array, group_sizes: Array) -> Array:
  def body(start, expert, out):
    block = jnp.einsum('RB,AB->RA', _rows(g, start), w[expert])
    return jax.lax.dynamic_update_slice_in_dim(out, block, start, 0)

  return _for_each_block(group_sizes, len(g), body, jnp.zeros((len(g), w.shape[1]), g.dtype))


def _blocks_tgmm(x: Array, g: Array, group_sizes: Array) -> Array:
  def body(start, expert, out):
    return out.at[expert].add(
      jnp.einsum('RA,RB->AB', _rows(x, start), _rows(g, start), preferred_element_type=jnp.float32)
    )

  shape = (len(group_sizes), x.shape[1], g.shape[1])
  return _for_each_block(group_sizes, len(x), body, jnp.zeros(shape, jnp.float32)).astype(x.dtype)


# [R, A] x [R, B] -> [E, A, B]: the ragged dimension is contracted.
_TGMM_DIMS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)
# [R, B] x [E, A, B] -> [R, A].
_GMM_T_DIMS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((1,), (2,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[0],
)


def _ragged_gmm_t(g: Array, w: Array, group_sizes: Array) -> Array:
  return jax.lax.ragged_dot_general(g, w, group_sizes, _GMM_T_DIMS)


def _ragged_tgmm(x: Array, g: Array, group_sizes: Array) -> Array:
  return jax.lax.ragged_dot_general(x, g, group_sizes, _TGMM_DIMS)


# Largest tiles of megablox: rows, and both sides of a weight (2 MiB of float32 sums on the chip).
MEGABLOX_TILES = (256, 512, 1024)


def megablox_backend(interpret: bool = False) -> Backend:
  """TPU: XLA's grouped kernel for the rows, JAX's megablox for the weights.

  `interpret` runs the latter's text without a TPU, for tests.
  """

  def tgmm(x: Array, g: Array, group_sizes: Array) -> Array:
    rows, *sides = MEGABLOX_TILES
    rows = min(rows, len(x) + -len(x) % LANES)
    tiles = [_tile(size, most) for size, most in zip((x.shape[1], g.shape[1]), sides)]
    pad = lambda a: jnp.pad(a, ((0, -len(a) % rows), (0, 0)))
    return megablox_tgmm(
      pad(x).T, pad(g), group_sizes, x.dtype, (rows, *tiles), interpret=interpret
    )

  return Backend('megablox', 1, jax.lax.ragged_dot, _ragged_gmm_t, tgmm)


def _tile(size: int, most: int) -> int:
  """The largest multiple of 128 that divides `size`, at most `most`; 128 if there is none."""
  return next((tile for tile in range(most, 0, -LANES) if size % tile == 0), LANES)


def tokamax_backend(row_legs: tuple[str, ...], weight_leg: tuple[str, ...]) -> Backend:
  """tokamax kernels: `row_legs` serve gmm and gmm_t, `weight_leg` serves tgmm, first choice first.

  On Hopper Mosaic is the fastest for the rows and Triton for the weights. The choices are explicit
  because tokamax's own default ends in the dense XLA product without a word.
  """
  if importlib.util.find_spec('tokamax') is None:
    raise errors.InputError(
      "config.model.moe.grouped_matmul='tokamax' (the default on a GPU) needs the package tokamax; "
      "install the extra: pip install 'moe_jax[cuda]'"
    )
  import tokamax

  # tokamax reads absl flags, and parses the command line itself (any program's) if nobody has.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

  def gmm(x, w, group_sizes):
    return tokamax.ragged_dot(x, w, group_sizes, implementation=row_legs)

  def gmm_t(g, w, group_sizes):
    return tokamax.ragged_dot_general(g, w, group_sizes, _GMM_T_DIMS, implementation=row_legs)

  def tgmm(x, g, group_sizes):
    dw = tokamax.ragged_dot_general(x, g, group_sizes, _TGMM_DIMS, implementation=weight_leg)
    # Some released Triton kernels leave a neighbour's product in an empty group (tokamax #887).
    return jnp.where((group_sizes > 0)[:, None, None], dw, 0)

  return Backend('tokamax', 1, gmm, gmm_t, tgmm)


BACKENDS: dict[str, Callable[[], Backend]] = {
  'blocks': lambda: Backend('blocks', BLOCK, _blocks_gmm, _blocks_gmm_t, _blocks_tgmm),
  'ragged_dot': lambda: Backend('ragged_dot', 1, jax.lax.ragged_dot, _ragged_gmm_t, _ragged_tgmm),
  'megablox': megablox_backend,
  'tokamax': lambda: tokamax_backend(('mosaic', 'triton'), ('triton', 'mosaic')),
}
PLATFORM_DEFAULT = {'cpu': 'blocks', 'tpu': 'megablox', 'gpu': 'tokamax'}


def choose(name: str) -> Backend:
  """The backend of that name; 'auto' takes the one for the platform, see `target.platform`.

  Raises:
    errors.InputError: the platform has no default, or the backend's package is not installed.
  """
  if name == 'auto':
    platform = target.platform()
    if platform not in PLATFORM_DEFAULT:
      raise errors.InputError(
        f"config.model.moe.grouped_matmul='auto' knows no kernel for platform {platform!r}; name "
        f'one of {", ".join(BACKENDS)}'
      )
    name = PLATFORM_DEFAULT[platform]
  return _made(name)


@functools.cache
def _made(name: str) -> Backend:
  return BACKENDS[name]()
