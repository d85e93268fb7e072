"""Weights laid out for decoding: products with them, and which layers multiply with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import hardware, partitioning
from moe_jax.inference import decode_layers
from moe_jax.models import decoder_block
from tests import tiny

# Two float32 sums in another order, of 19 terms of magnitude about 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rows', [1, 2, 8, 17])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('height, parts', [(7, 1), (129, 1), (128, 2)])
def test_product_with_a_matrix_laid_out_for_decoding(monkeypatch, rows, dtype, height, parts):
  """Few rows, many, and widths that are no multiples of a vector register."""
  monkeypatch.setattr(decode_layers.os, 'cpu_count', lambda: 2)
  monkeypatch.setattr(decode_layers, 'LEAST_SIZE', 64 * 19)
  rng = np.random.default_rng(rows)
  x, w = (jnp.array(rng.normal(size=shape), dtype) for shape in ((rows, 1, 19), (height, 19)))
  matrix = decode_layers.in_rows(w)
  assert len(matrix.parts) == parts and matrix.num == height
  got = decode_layers.product(x, matrix)
  assert got.shape == (rows, 1, height) and got.dtype == dtype
  want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
  # bfloat16: 8 bits of mantissa in the result.
  tolerance = CLOSE if dtype == jnp.float32 else dict(rtol=0.01, atol=0.02)
  np.testing.assert_allclose(np.asarray(got, np.float64), want, **tolerance)
  assert decode_layers.product(x, matrix, jnp.float32).dtype == jnp.float32


def laid_out(**overrides):
  """(kernels, layer types) of the first MoE layer's block."""
  cfg = tiny.make(**overrides).model
  own = jax.tree.map(lambda a: a[0], partitioning.unbox(tiny.params(cfg)['moe_layers']))
  _, kernels = decode_layers.lay_out(cfg, True, own)
  return kernels, decode_layers.layer_types(kernels)


def test_a_cpu_has_all_layers_in_rows():
  kernels, types = laid_out()
  assert set(kernels) == {'attention', 'moe'} and set(kernels['moe']) == {'shared', 'experts'}
  assert types.moe is decode_layers.RowsMoE and types.attention is decode_layers.RowsAttention
  kernels, types = laid_out(model__moe__dispatch='dense')
  assert set(kernels['moe']) == {'shared'} and types.moe is decode_layers.RowsSharedMoE


def test_other_platforms_have_the_absorbed_form_and_no_more(monkeypatch):
  monkeypatch.setattr(hardware, 'platform', lambda: 'gpu')
  kernels, types = laid_out(model__attention__kind='mla')
  assert set(kernels) == {'attention'} and set(kernels['attention']) == {'absorbed'}
  assert types == decoder_block.LayerTypes(latent_attention=decode_layers.AbsorbedMLA)
  assert laid_out()[0] == {}
