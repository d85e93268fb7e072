"""Experts whose products see int8 or float8: an option, never the default.

Both operands of the two forward products are rounded by qwix to symmetric absmax scales: rows of
activations each by its own scale, weights by one scale per expert and output channel. Sums are in
the products' wide type. The backward pass is that of the rounded values, straight through the
rounding itself: gradients of rows and weights are products in the compute dtype. Router, scores,
gates, shared experts and statistics stay unrounded.

On a GPU or TPU the rounded values reach the kernels as they are (`qwix.QArray`). A CPU has no such
products: there the same values are multiplied in float32, which shows what rounding does to a model
and saves nothing. Where a mesh axis splits the experts' width, each device has scales of its own.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax import errors
from moe_jax.models.experts import grouped_kernels

Array = jax.Array


class Rounding(NamedTuple):
  """What becomes of the operands of a product, in the dtype that they have."""

  rows: Callable[[Array], Array]  # [rows, I]
  weights: Callable[[Array], Array]  # [E, I, O]


def _unchanged(a: Array) -> Array:
  return a


NONE = Rounding(_unchanged, _unchanged)


def _library(qtype: str) -> Any:
  """qwix.

  Raises:
    errors.InputError: it is not installed.
  """
  errors.require(
    importlib.util.find_spec('qwix') is not None,
    f'config.model.moe.grouped_matmul={qtype!r} needs qwix, which is not installed; install the '
    "extra: pip install 'moe_jax[quant]', or use 'auto'",
  )
  import qwix

  return qwix


# qwix sends the largest magnitude to 127.5 of int8, a tie that the last bit decides; 127 is none.
CALIBRATION = {'int8': f'absmax,{127.5 / 127}', 'float8_e4m3fn': 'absmax'}


def _rows(qwix: Any, qtype: str, rows: Array) -> Any:
  return qwix.quantize(rows, qtype, channelwise_axes=(0,), calibration_method=CALIBRATION[qtype])


def _weights(qwix: Any, qtype: str, weights: Array) -> Any:
  return qwix.quantize(
    weights, qtype, channelwise_axes=(0, 2), calibration_method=CALIBRATION[qtype]
  )


def rounding(qtype: str) -> Rounding:
  """Rounds to `qtype` ('int8', 'float8_e4m3fn') and back."""
  qwix = _library(qtype)
  return Rounding(
    lambda rows: qwix.dequantize(_rows(qwix, qtype, rows)).astype(rows.dtype),
    lambda weights: qwix.dequantize(_weights(qwix, qtype, weights)).astype(weights.dtype),
  )


def rounded_products(wide: grouped_kernels.Products, qtype: str) -> grouped_kernels.Products:
  """The products of `wide`, the forward ones of rounded rows and weights."""
  qwix, rounded = _library(qtype), rounding(qtype)

  def gmm(rows: Array, weights: Array, group_sizes: Array) -> Array:
    product = wide.quantised or qwix.ragged_dot
    out = product(_rows(qwix, qtype, rows), _weights(qwix, qtype, weights), group_sizes)
    return out.astype(rows.dtype)

  def gmm_t(g: Array, weights: Array, group_sizes: Array) -> Array:
    return wide.gmm_t(g, rounded.weights(weights), group_sizes)

  def tgmm(rows: Array, g: Array, group_sizes: Array) -> Array:
    return wide.tgmm(rounded.rows(rows), g, group_sizes)

  return grouped_kernels.Products(f'{wide.name} {qtype}', gmm, gmm_t, tgmm)
