"""Grouped matrix products by the kernels of others: JAX's megablox for TPUs, tokamax for GPUs.

Three products over the same layout (see `sorted_plan.Plan`), rows in E groups:

  gmm    x [rows, I], w [E, I, O]     -> [rows, O]    forward
  gmm_t  g [rows, O], w [E, I, O]     -> [rows, I]    gradient of the rows
  tgmm   x [rows, I], g [rows, O]     -> [E, I, O]    gradient of the weights; 0 for an empty group

Rows past the sum of `group_sizes` [E] are zeros on the way in; what comes back there is undefined.

`jax.lax.ragged_dot` lowers to a grouped kernel on TPU for the rows, but to a masked dense product
(E times the work) for the weights, and for everything on CPU and GPU. So `backends` never chooses
it there, and on TPU takes JAX's megablox kernel for the weights.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm as megablox_tgmm

from moe_jax import errors
from moe_jax.devices import tokamax_tiles

Array = jax.Array
Product = Callable[[Array, Array, Array], Array]

LANES = 128  # of a TPU's registers
MOSAIC_WIDTH = 64  # of the tiles of tokamax's Mosaic kernels for GPUs


class Products(NamedTuple):
  """The three grouped products by one library."""

  name: str
  gmm: Product
  gmm_t: Product
  tgmm: Product
  quantised: Product | None = None  # gmm of `qwix.QArray`s; None = XLA's


# [rows, I] x [E, I, O] -> [rows, O].
_GMM_DIMS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((1,), (1,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[0],
)
# [rows, I] x [rows, O] -> [E, I, O]: the ragged dimension is contracted.
_TGMM_DIMS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)
# [rows, O] x [E, I, O] -> [rows, I].
_GMM_T_DIMS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((1,), (2,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[0],
)


def _ragged_gmm_t(g: Array, w: Array, group_sizes: Array) -> Array:
  return jax.lax.ragged_dot_general(g, w, group_sizes, _GMM_T_DIMS)


def _ragged_tgmm(x: Array, g: Array, group_sizes: Array) -> Array:
  return jax.lax.ragged_dot_general(x, g, group_sizes, _TGMM_DIMS)


def ragged_dot_products() -> Products:
  """`jax.lax.ragged_dot` in all three."""
  return Products('ragged_dot', jax.lax.ragged_dot, _ragged_gmm_t, _ragged_tgmm)


# Largest tiles of megablox: rows, and both sides of a weight (2 MiB of float32 sums on the chip).
MEGABLOX_TILES = (256, 512, 1024)


def megablox_products(interpret: bool = False) -> Products:
  """TPU: XLA's grouped kernel for the rows, JAX's megablox for the weights.

  `interpret` runs the latter's text without a TPU, for tests.
  """

  def tgmm(x: Array, g: Array, group_sizes: Array) -> Array:
    rows, *sides = MEGABLOX_TILES
    rows = min(rows, len(x) + -len(x) % LANES)
    tiles = [_tile(size, most) for size, most in zip((x.shape[1], g.shape[1]), sides)]
    x, g = (jnp.pad(a, ((0, -len(a) % rows), (0, 0))) for a in (x, g))
    return megablox_tgmm(x.T, g, group_sizes, x.dtype, (rows, *tiles), interpret=interpret)

  return Products('megablox', jax.lax.ragged_dot, _ragged_gmm_t, tgmm)


def _tile(size: int, most: int) -> int:
  """The largest multiple of 128 that divides `size`, at most `most`; 128 if there is none."""
  return next((tile for tile in range(most, 0, -LANES) if size % tile == 0), LANES)


def tokamax_products(for_rows: tuple[str, ...], for_weights: tuple[str, ...]) -> Products:
  """tokamax kernels: `for_rows` serve gmm and gmm_t, `for_weights` tgmm, first choice first.

  On Hopper Mosaic is the fastest for the rows and Triton for the weights. The choices are explicit
  because tokamax's own default ends in the dense XLA product without a word.

  Raises:
    errors.InputError: tokamax, or what its Triton kernels need, is not installed.
  """
  library = functools.partial(
    tokamax_tiles.load, "config.model.moe.grouped_matmul='tokamax' (the default on a GPU)"
  )
  library()  # missing packages are told of now, not in the middle of a model
  from tokamax._src.ops.ragged_dot import api

  errors.require(
    'triton' in api.IMPLEMENTATIONS or 'triton' not in {*for_rows, *for_weights},
    "config.model.moe.grouped_matmul='tokamax' needs Triton kernels, which this tokamax leaves out "
    "without the packages jax-triton and triton; install the extra: pip install 'moe_jax[cuda]'",
  )

  def product(a, b, group_sizes, dims, names):
    names = _serving(names, (*a.shape[1:], *b.shape[1:]))
    return library().ragged_dot_general(a, b, group_sizes, dims, implementation=names)

  def gmm(x, w, group_sizes):
    return product(x, w, group_sizes, _GMM_DIMS, for_rows)

  def gmm_t(g, w, group_sizes):
    return product(g, w, group_sizes, _GMM_T_DIMS, for_rows)

  def tgmm(x, g, group_sizes):
    dw = product(x, g, group_sizes, _TGMM_DIMS, for_weights)
    # Some released Triton kernels leave a neighbour's product in an empty group (tokamax #887).
    return jnp.where((group_sizes > 0)[:, None, None], dw, 0)

  def quantised(x, w, group_sizes):
    # Mosaic's path for quantised operands needs what JAX 0.10 does not have (tokamax 0.0.12).
    return product(x, w, group_sizes, _GMM_DIMS, for_weights[:1])

  return Products('tokamax', gmm, gmm_t, tgmm, quantised)


def _serving(names: tuple[str, ...], widths: tuple[int, ...]) -> tuple[str, ...]:
  """The implementations that take matrices of these widths.

  Mosaic's tiles on a GPU are 64 wide, and it fails on others instead of leaving them to the next.
  """
  if all(width % MOSAIC_WIDTH == 0 for width in widths):
    return names
  return tuple(name for name in names if name != 'mosaic') or names
