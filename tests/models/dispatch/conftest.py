"""Other platforms' products of experts, for the tests of this folder."""

import pytest

from moe_jax.models.experts import backends, grouped_kernels, grouped_products


@pytest.fixture(scope='module', autouse=True)
def tokamax_on_cpu():
  """What a CPU has of other platforms' backends: tokamax's XLA products, and megablox's text."""
  products = {
    'tokamax_xla': lambda: grouped_kernels.tokamax_products(('xla',), ('xla',)),
    'megablox_text': lambda: grouped_kernels.megablox_products(interpret=True),
  }
  for name, make in products.items():
    backends.BACKENDS[name] = lambda make=make: grouped_products.GroupedExperts(make())
  yield
  del backends.BACKENDS['tokamax_xla'], backends.BACKENDS['megablox_text']
