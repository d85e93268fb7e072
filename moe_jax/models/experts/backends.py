"""The expert backends by name: loops over blocks on a CPU, grouped kernels elsewhere.

`jax.lax.ragged_dot` lowers to a grouped kernel on TPU for the rows, but to a masked dense product
(E times the work) for the weights, and for everything on CPU and GPU. So 'auto' never chooses it;
tests do, as the reference that is easiest to read.
"""

import functools
from collections.abc import Callable

from moe_jax import errors
from moe_jax.config import moe_config
from moe_jax.devices import hardware
from moe_jax.models.experts import (
  cpu_blocks,
  expert_backend,
  grouped_kernels,
  grouped_products,
  low_precision,
)


def _ragged_dot() -> expert_backend.ExpertBackend:
  return grouped_products.GroupedExperts(grouped_kernels.ragged_dot_products())


def _megablox(qtype: str = '') -> expert_backend.ExpertBackend:
  return _grouped(grouped_kernels.megablox_products(), qtype)


def _tokamax(qtype: str = '') -> expert_backend.ExpertBackend:
  products = grouped_kernels.tokamax_products(('mosaic', 'triton'), ('triton', 'mosaic'))
  return _grouped(products, qtype)


def _grouped(products: grouped_kernels.Products, qtype: str) -> expert_backend.ExpertBackend:
  if qtype:
    products = low_precision.rounded_products(products, qtype)
  return grouped_products.GroupedExperts(products)


def _blocks(qtype: str = '') -> expert_backend.ExpertBackend:
  if not qtype:
    return cpu_blocks.BlockExperts()
  return cpu_blocks.BlockExperts(f'blocks {qtype}', low_precision.rounding(qtype))


BACKENDS: dict[str, Callable[[], expert_backend.ExpertBackend]] = {
  'blocks': _blocks,
  'ragged_dot': _ragged_dot,
  'megablox': _megablox,
  'tokamax': _tokamax,
}
PLATFORM_DEFAULT = {'cpu': 'blocks', 'tpu': 'megablox', 'gpu': 'tokamax'}
# By platform, with products of a number format.
LOW_PRECISION: dict[str, Callable[[str], expert_backend.ExpertBackend]] = {
  'cpu': _blocks,
  'tpu': _megablox,
  'gpu': _tokamax,
}


def choose(name: str) -> expert_backend.ExpertBackend:
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
  return _made(PLATFORM_DEFAULT[platform]) if name == 'auto' else _made_low(platform, name)


@functools.cache
def _made(name: str) -> expert_backend.ExpertBackend:
  return BACKENDS[name]()


@functools.cache
def _made_low(platform: str, qtype: str) -> expert_backend.ExpertBackend:
  return LOW_PRECISION[platform](qtype)
