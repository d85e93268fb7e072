import types

import jax
import pytest
from jax.extend import backend

from moe_jax.devices import hardware, partitioning
from tests import tiny


@pytest.mark.parametrize(
  'kind, want',
  [('TPU v5 lite', 'tpu'), ('TPU7x', 'tpu'), ('NVIDIA H100 80GB HBM3', 'gpu'), ('cpu', 'cpu')],
)
def test_the_platform_is_that_of_the_mesh_in_force(monkeypatch, kind, want):
  mesh = types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind=kind))
  monkeypatch.setattr(jax.sharding, 'get_abstract_mesh', lambda: mesh)
  assert hardware.platform() == want


def test_the_platform_without_a_mesh_and_under_one_of_this_host():
  assert hardware.platform() == 'cpu'
  with partitioning.activate(tiny.mesh(data=8)):
    assert hardware.platform() == 'cpu'


@pytest.mark.parametrize(
  'version, want', [('9.0', (9, 0)), ('12.1', (12, 1)), ('gfx90a', ()), (None, ())]
)
def test_compute_capability(monkeypatch, version, want):
  device = type('Device', (), {'compute_capability': version} if version else {})
  monkeypatch.setattr(backend, 'get_default_device', lambda: device)
  assert hardware.compute_capability() == want
