"""Scales of float8 weights, block by block."""

import ml_dtypes
import numpy as np
import pytest

from moe_jax.interop import float8


def test_each_weight_gets_the_scale_of_its_block():
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(5, 7)).astype(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(0.5, 2.0, (3, 2)).astype(np.float32)
  assert float8.scale_shape((5, 7), (2, 4)) == (3, 2)
  got = float8.dequantise(weight, scale, (2, 4), np.dtype(ml_dtypes.bfloat16))
  for i in range(5):
    for j in range(7):
      want = weight[i, j].astype(np.float32) * scale[i // 2, j // 4]
      assert got[i, j] == want.astype(ml_dtypes.bfloat16)


def test_scales_of_another_matrix():
  with pytest.raises(ValueError, match='do not fit'):
    float8.dequantise(
      np.zeros((4, 4), ml_dtypes.float8_e4m3fn), np.ones((1, 1)), (2, 2), np.dtype(np.float32)
    )
