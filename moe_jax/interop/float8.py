"""Float8 weights with one scale per block, as DeepSeek-V3 is released (its report, section 3.3)."""

import numpy as np

SCALE_SUFFIX = '_scale_inv'  # 'X.weight' has its scales in 'X.weight_scale_inv'


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
  """Shape of the scales of a matrix [rows, columns] whose last blocks may be smaller."""
  return tuple(-(-size // extent) for size, extent in zip(shape, block))


def dequantise(
  weight: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
  """weight * scale of its block, in float32 and then rounded to `dtype`.

  Args:
    weight: [rows, columns], float8.
    scale: [ceil(rows / block[0]), ceil(columns / block[1])]; the files call it an inverse, but it
      is what a weight is multiplied by.
    block: rows and columns that share a scale.
    dtype: of the result, [rows, columns].
  """
  if scale.shape != scale_shape(weight.shape, block):
    raise ValueError(f'scales {scale.shape} do not fit {weight.shape} in blocks of {block}')
  # A table of the 256 values is several times as fast as a conversion.
  values = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
  out = np.empty(weight.shape, dtype)
  for i, factors in enumerate(scale.astype(np.float32)):
    rows = slice(i * block[0], (i + 1) * block[0])
    columns = np.repeat(factors, block[1])[: weight.shape[1]]
    out[rows] = values[weight[rows].view(np.uint8)] * columns
  return out
