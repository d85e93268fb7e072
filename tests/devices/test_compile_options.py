"""Options of the compiler by platform and mesh; test_tpu_aot and test_gpu_aot hand them to it."""

import types

import numpy as np
import pytest

from moe_jax.devices import compile_options


def mesh(platform, kind, size, expert=1):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  devices = np.array([device] * size)
  return types.SimpleNamespace(devices=devices, size=size, shape={'expert': expert})


@pytest.mark.parametrize(
  'platform, kind, size, expert, name',
  [
    ('cpu', 'cpu', 8, 4, None),
    ('gpu', 'NVIDIA H200', 1, 1, None),
    ('gpu', 'NVIDIA H200', 8, 1, 'xla_gpu_enable_latency_hiding_scheduler'),
    ('tpu', 'TPU v5p', 8, 1, None),
    ('tpu', 'TPU v5p', 64, 4, 'xla_tpu_enable_async_all_to_all'),
    ('tpu', 'TPU v5 lite', 8, 4, 'xla_tpu_enable_async_all_to_all'),
    ('tpu', 'TPU v5 lite', 64, 4, None),  # its compiler refuses it there
  ],
)
def test_options(platform, kind, size, expert, name):
  assert list(compile_options.for_step(mesh(platform, kind, size, expert))) == [name] * bool(name)


@pytest.mark.parametrize('platform, level', [('cpu', 1), ('gpu', None), ('tpu', None)])
def test_only_a_cpu_compiles_first_states_in_haste(platform, level, monkeypatch):
  monkeypatch.setattr(compile_options, 'FIRST_STATE_LEVEL', 1)
  found = compile_options.for_first_state(mesh(platform, 'any', 1))
  assert found.get('xla_backend_optimization_level') == level
