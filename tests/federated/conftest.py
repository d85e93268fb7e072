"""Tiny images of the digits' shape, without scikit-learn."""

import numpy as np
import pytest

from moe_jax.federated import partition


@pytest.fixture(scope='session')
def images() -> partition.Images:
  """40 training and 4 test images of each of 10 classes; a class is a bright pixel, blurred."""
  rng = np.random.default_rng(0)

  def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.repeat(np.arange(10, dtype=np.int32), number)
    x = rng.integers(0, 6, (len(y), 8, 8, 1))
    x[np.arange(len(y)), y // 4 * 2, y % 4 * 2, 0] += 10
    return x.astype(np.uint8), y

  return partition.Images(*draw(40), *draw(4))
