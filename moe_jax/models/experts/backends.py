"""What computes all experts over a sorted plan, behind one table: loops on CPU, kernels elsewhere.

`jax.lax.ragged_dot` lowers to a grouped kernel on TPU for the rows, but to a masked dense product
(E times the work) for the weights, and for everything on CPU and GPU. So 'auto' never chooses it;
tests do, as the reference that is easiest to read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax import errors
from moe_jax.config import moe_config
from moe_jax.devices import hardware
from moe_jax.models.experts import cpu_blocks, grouped_kernels, grouped_products, low_precision

Array = jax.Array


class Backend(NamedTuple):
  """Forward and backward of all experts."""

  name: str
  covers: bool  # whether a plan's groups must cover all rows, as kernels leave none unwritten
  # (keep, limited, x, gates, w13, w2, plan) -> (out, h if it is kept); see
  # `grouped_products.forward`
  forward: Callable[..., tuple[Array, Array]]
  # (limited, x, gates, w13, w2, plan, h, d_out) -> gradients of x, gates, w13, w2
  backward: Callable[..., tuple[Array, Array, Array, Array]]


def of_legs(products: grouped_kernels.Backend) -> Backend:
  """The backend that these grouped products make."""
  forward = lambda keep, *args: grouped_products.forward(
    products, *args
  )  # what nobody reads XLA leaves out
  return Backend(
    products.name, True, forward, functools.partial(grouped_products.backward, products)
  )


def _of_blocks(qtype: str) -> Backend:
  """Loops visit no row behind the last group, so limited or not is the same to them."""
  rounding = low_precision.rounding(qtype) if qtype else low_precision.NONE
  forward = lambda keep, limited, *args: cpu_blocks.forward(keep, *args, rounding)
  backward = lambda limited, *args: cpu_blocks.backward(*args, rounding)
  return Backend(f'blocks {qtype}'.strip(), False, forward, backward)


def _tokamax() -> grouped_kernels.Backend:
  return grouped_kernels.tokamax_backend(('mosaic', 'triton'), ('triton', 'mosaic'))


BACKENDS: dict[str, Callable[[], Backend]] = {
  'blocks': lambda: _of_blocks(''),
  'ragged_dot': lambda: of_legs(grouped_kernels.ragged_dot_backend()),
  'megablox': lambda: of_legs(grouped_kernels.megablox_backend()),
  'tokamax': lambda: of_legs(_tokamax()),
}
PLATFORM_DEFAULT = {'cpu': 'blocks', 'tpu': 'megablox', 'gpu': 'tokamax'}
# By platform, with products of a number format.
LOW_PRECISION: dict[str, Callable[[str], Backend]] = {
  'cpu': _of_blocks,
  'tpu': lambda qtype: of_legs(low_precision.legs(grouped_kernels.megablox_backend(), qtype)),
  'gpu': lambda qtype: of_legs(low_precision.legs(_tokamax(), qtype)),
}


def choose(name: str) -> Backend:
  """The backend of that name.

  'auto' takes the one for the platform, see `hardware.platform`; a number format takes it too, with
  products of that format (`low_precision`).

  Raises:
    errors.InputError: the platform has no default, or the backend's package is not installed.
  """
  if name != 'auto' and name not in moe_config.LOW_PRECISION:
    return _made(name)
  platform = hardware.platform()
  errors.require(
    platform in PLATFORM_DEFAULT,
    f'config.model.moe.grouped_matmul={name!r} knows no kernel for platform {platform!r}; name one '
    f'of {", ".join(BACKENDS)}',
  )
  return _made(PLATFORM_DEFAULT[platform]) if name == 'auto' else _low(platform, name)


@functools.cache
def _made(name: str) -> Backend:
  return _one_by_one(BACKENDS[name]())


@functools.cache
def _low(platform: str, qtype: str) -> Backend:
  return _one_by_one(LOW_PRECISION[platform](qtype))


def _one_by_one(backend: Backend) -> Backend:
  """The backend, whose batches under `jax.vmap` (seeds as an axis) run one after the other.

  Loops with a batched number of blocks would go on until all are done and select on everything they
  carry; and kernels know no axis in front of the experts.
  """

  @functools.cache
  def forward(*static: bool) -> Callable[..., Any]:
    return jax.custom_batching.sequential_vmap(functools.partial(backend.forward, *static))

  @functools.cache
  def backward(limited: bool) -> Callable[..., Any]:
    return jax.custom_batching.sequential_vmap(functools.partial(backend.backward, limited))

  def forward_named(keep: bool, limited: bool, *args: Any) -> tuple[Array, Array | None]:
    out, h = forward(keep, limited)(*args)
    return out, None if h is None else checkpoint_name(h, 'moe_h')  # what remat looks for

  return backend._replace(
    forward=forward_named, backward=lambda limited, *args: backward(limited)(*args)
  )
