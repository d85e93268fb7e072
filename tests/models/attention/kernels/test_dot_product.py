import jax
import numpy as np
import pytest

from moe_jax.models.attention.kernels import (
  dot_product,
)
from tests.models.attention.kernels import operands

# dot_product


@pytest.mark.parametrize('length, head_dims', [(16, (8, 8)), (15, (12, 6)), (15, (6, 12))])
def test_what_cudnn_is_given(monkeypatch, length, head_dims):
  """Even length, equal widths, a multiple of 8; the result is as without."""
  given = []

  def record(q, k, v, *, implementation, **rest):
    given.append((implementation, q.shape, k.shape, v.shape, rest['mask'].shape))
    return original(q, k, v, implementation='xla', **rest)

  original = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', record)
  monkeypatch.setattr(dot_product, 'cudnn_runs', lambda *args: True)
  shape = operands.Shape(2, 1, *head_dims, 0.4)
  *arrays, d_out = operands.operands(shape, rows=1, length=length)
  positions, ids = operands.batch([(5, 7)], length)
  got = dot_product.attend(*arrays, positions, ids, shape.scale)
  want, _ = operands.written_out(*arrays, d_out, ids, shape.scale)
  np.testing.assert_allclose(got[:, :12], want[:, :12], **operands.CLOSE)
  width = -max(head_dims) // 8 * -8
  q, kv = (1, 16, 2, width), (1, 16, 1, width)
  assert given == [('cudnn', q, kv, kv, (1, 1, 16, 16))]
