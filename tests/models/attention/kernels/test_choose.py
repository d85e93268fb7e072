"""Which implementation `auto` takes on which platform."""

import importlib.util

import pytest

from moe_jax import errors
from moe_jax.config import attention_config
from moe_jax.models.attention import kernels as kernels_lib
from tests.models.attention.kernels import operands

BACKENDS = ('tpu', 'gpu', 'cpu')


def test_auto_on_a_cpu_asks_the_length():
  assert operands.choose(length=63) == 'reference'
  assert operands.choose(length=64) == operands.choose(length=256) == 'short'
  assert operands.choose(length=257) == 'chunked'


def test_auto_on_a_tpu_is_splash(monkeypatch):
  operands.on(monkeypatch, 'tpu')
  assert (
    operands.choose()
    == operands.choose('splash')
    == operands.choose(dims=(192, 128), dtype='float32')
    == 'splash'
  )


@pytest.mark.parametrize(
  'capability, dims, dtype, short, long',
  [
    ((9, 0), (128, 128), 'bfloat16', 'dot_product', 'tokamax'),  # no mask of a long row
    ((9, 0), (192, 128), 'float16', 'tokamax', 'tokamax'),  # nothing is padded
    ((10, 0), (256, 256), 'bfloat16', 'dot_product', 'tokamax'),
    ((9, 0), (264, 264), 'bfloat16', 'reference', 'tokamax'),  # too wide for cuDNN
    ((9, 0), (128, 128), 'float32', 'reference', 'chunked'),
    ((8, 0), (128, 128), 'bfloat16', 'dot_product', 'tokamax'),
    ((8, 9), (136, 136), 'bfloat16', 'reference', 'tokamax'),
    ((8, 0), (64, 136), 'bfloat16', 'tokamax', 'tokamax'),
    ((7, 5), (64, 64), 'bfloat16', 'reference', 'chunked'),
    ((), (64, 64), 'bfloat16', 'reference', 'chunked'),  # no NVIDIA GPU
  ],
)
def test_auto_on_a_gpu(monkeypatch, capability, dims, dtype, short, long):
  operands.on(monkeypatch, 'gpu', capability)
  assert operands.choose(dims=dims, dtype=dtype, length=256) == short
  assert operands.choose(dims=dims, dtype=dtype, length=4096) == long


def test_auto_on_a_gpu_without_tokamax_is_cudnn_where_it_serves(monkeypatch):
  operands.on(monkeypatch, 'gpu', (9, 0))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert operands.choose(dims=(192, 128), length=4096) == 'dot_product'
  assert operands.choose(dims=(264, 128), length=4096) == 'chunked'


def test_a_named_implementation_is_taken_where_it_runs(monkeypatch):
  for platform in BACKENDS:
    operands.on(monkeypatch, platform)
    for name in ('reference', 'short', 'chunked', 'dot_product'):
      assert operands.choose(name, length=10_000) == name
  for platform in ('cpu', 'gpu'):
    operands.on(monkeypatch, platform)
    with pytest.raises(errors.InputError, match=rf"attention\.impl='splash' .*'{platform}'.*auto"):
      operands.choose('splash')


def test_the_config_and_the_table_know_the_same_names():
  assert ('auto', *kernels_lib.ATTENDS) == attention_config.IMPLS


def test_an_unknown_name():
  with pytest.raises(errors.InputError, match=r"attention\.impl='chunk'.*did you mean 'chunked'"):
    operands.choose('chunk')
