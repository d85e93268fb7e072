import functools
import importlib.util

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.models.attention import kernels as kernels_lib
from moe_jax.models.attention.kernels import (
  chunked,
  splash,
  tokamax,
)
from tests import tiny
from tests.models.attention.kernels import operands


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Several blocks per row, so that there are some before, on and after the diagonal."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunked, 'BLOCK', 32)
    patch.setattr(splash, 'BLOCKS', (splash.LANES,))
    yield


# tokamax


def test_tokamax_without_a_gpu_says_what_to_do(monkeypatch):
  arrays = operands.operands(operands.SHAPES['MHA'])[:3]
  with pytest.raises(
    errors.InputError, match=r"attention\.impl='tokamax' .*'cpu'.*'auto'.*chunked"
  ):
    kernels_lib.ATTENDS['tokamax'](*arrays, *operands.batch(), 1.0)
  operands.on(monkeypatch, 'gpu', (9, 0))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.InputError, match=r"attention\.impl='tokamax' .*moe_jax\[cuda\]"):
    operands.choose('tokamax')


@pytest.mark.parametrize('kernels', [('xla',), ('xla_chunked',)])
def test_tokamax_for_a_part_of_the_queries_is_that_part(kernels):
  """The last 100 tokens against keys of whole rows; sums of up to 150 float32 terms."""
  shape, (positions, ids) = operands.SHAPES['MLA'], operands.batch()
  q, k, v, _ = operands.operands(shape)
  run = tiny.jit(functools.partial(tokamax.attend, scale=shape.scale, kernels=kernels))
  whole, part = run(q, k, v, positions, ids), run(q[:, 50:], k, v, positions, ids, first=50)
  real = np.asarray(ids[:, 50:]) > 0
  np.testing.assert_allclose(
    np.asarray(part)[real], np.asarray(whole[:, 50:])[real], **operands.CLOSE
  )
