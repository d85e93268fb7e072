import types

import jax
import pytest
from jax.experimental import topologies
from jax.extend import backend

from moe_jax import errors
from moe_jax.planning import chips, gpu_targets


def test_an_unknown_target_names_the_nearest():
  with pytest.raises(errors.InputError, match="target='h10'.*h100"):
    gpu_targets.describe('h10')


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(gpu_targets, 'installed', lambda: False)
  with pytest.raises(errors.InputError, match="'h100' needs the CUDA plugin.*jax-cuda13-plugin"):
    gpu_targets.describe('h100')


def test_devices_of_a_target_are_described_to_the_plugin(monkeypatch):
  seen = []

  def describe(*args, **kwargs):
    seen.append((args, kwargs))
    return types.SimpleNamespace(devices=['a', 'b'])

  monkeypatch.setattr(gpu_targets, 'installed', lambda: True)
  monkeypatch.setattr(topologies, 'get_topology_desc', describe)
  assert gpu_targets.describe('h100', 2) == ['a', 'b']
  wanted = {'target_config': gpu_targets.TARGETS['h100'], 'topology': '1x1x2'}
  assert seen == [(('h100x2', 'cuda'), wanted)]


def test_the_two_descriptions_differ_in_memory_and_name_only():
  lines = [text.splitlines() for text in gpu_targets.TARGETS.values()]
  differing = [a.split(':')[0].strip() for a, b in zip(*lines) if a != b]
  assert differing == ['memory_bandwidth', 'device_memory_size', 'device_description_str']
  # The makers' 3.35 TB/s and 80 GB, in bytes.
  assert 'memory_bandwidth: 3352320000000' in gpu_targets.TARGETS['h100']


def test_plans_and_compilers_are_told_the_same_of_a_device():
  for name, text in gpu_targets.TARGETS.items():
    chip = chips.CHIPS[name]
    assert f'device_memory_size: {chip.hbm_bytes}\n' in text
    assert f'memory_bandwidth: {chip.hbm_bandwidth:.0f}\n' in text
  # What drivers report to a program, in bytes: 79.1 and 139.8 GiB.
  assert [round(chips.CHIPS[n].hbm_bytes / 2**30, 1) for n in ('h100', 'h200')] == [79.1, 139.8]


def test_a_device_is_the_default_inside_only_and_also_after_an_error():
  real, device = backend.get_default_device, jax.devices()[3]
  with gpu_targets.as_default(device):
    assert backend.get_default_device() is device
  with pytest.raises(KeyError), gpu_targets.as_default(device):
    raise KeyError
  assert backend.get_default_device is real
