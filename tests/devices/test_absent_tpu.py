import pytest

from moe_jax.devices import absent_tpu


@pytest.mark.parametrize(
  'name', ['accel0', 'vfio/0', 'nvidia3', 'nvidiactl', 'kfd', 'dxg', 'null', 'vfio/vfio']
)
def test_a_device_file_of_an_accelerator_is_seen(tmp_path, name):
  path = tmp_path / 'dev' / name
  path.parent.mkdir(parents=True)
  path.touch()
  assert absent_tpu.is_bare({}, tmp_path) == (name in ('null', 'vfio/vfio'))


def test_a_tpu_on_the_bus_and_a_choice_of_the_user_are_seen(tmp_path):
  vendor = tmp_path / 'sys/bus/pci/devices/0000:00:04.0/vendor'
  vendor.parent.mkdir(parents=True)
  vendor.write_text('0x8086\n')
  assert absent_tpu.is_bare({'JAX_PLATFORMS': ''}, tmp_path)
  assert not absent_tpu.is_bare({'JAX_PLATFORMS': 'tpu'}, tmp_path)
  assert not absent_tpu.is_bare({'TPU_NAME': 'local'}, tmp_path)
  vendor.write_text('0x1ae0\n')
  assert not absent_tpu.is_bare({}, tmp_path)


CASES = [(True, True, []), (True, False, []), (False, True, []), (True, True, ['metal'])]


@pytest.mark.parametrize('bare, has_library, others', CASES)
def test_jax_is_told_only_where_the_library_would_complain(monkeypatch, bare, has_library, others):
  told = []
  assert not absent_tpu._other_plugins()  # of this environment
  monkeypatch.setattr(absent_tpu, '_other_plugins', lambda: others)
  monkeypatch.setattr(absent_tpu, 'is_bare', lambda environ, root: bare)
  monkeypatch.setattr(
    absent_tpu.importlib.util, 'find_spec', lambda name: object() if has_library else None
  )
  monkeypatch.setattr(absent_tpu.jax.config, 'update', lambda *pair: told.append(pair))
  absent_tpu.use_cpu_where_nothing_else_is()
  wanted = bare and has_library and not others
  assert told == ([('jax_platforms', 'cpu')] if wanted else [])
