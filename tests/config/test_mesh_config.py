import dataclasses

import pytest

from moe_jax import errors
from moe_jax.config import mesh_config
from tests import tiny


def mesh_of(**axes) -> mesh_config.MeshConfig:
  """All axes 1 but these."""
  ones = dict.fromkeys(mesh_config.AXES, 1) | {'stage_micro_batches': 0, 'zero1': False}
  return mesh_config.MeshConfig(**(ones | axes))


def test_axes_are_the_fields_that_are_sizes_in_order():
  assert (
    *('stage', 'dcn_data', 'dcn_fsdp', 'data', 'fsdp', 'expert', 'sequence', 'tensor'),
  ) == mesh_config.AXES
  assert mesh_config.sizes(mesh_of(fsdp=2, expert=-1)) == {
    **dict.fromkeys(mesh_config.AXES, 1),
    'fsdp': 2,
    'expert': -1,
  }


def test_one_axis_takes_the_devices_that_are_left():
  # 16 devices / (2 x 4) = 2
  found = mesh_config.resolve(mesh_of(dcn_data=2, data=-1, expert=4), 16)
  assert (found['dcn_data'], found['data'], found['expert']) == (2, 2, 4)
  assert mesh_config.resolve(mesh_of(data=-1), 1)['data'] == 1
  assert mesh_config.resolve(mesh_of(data=2, tensor=3), 6)['tensor'] == 3


@pytest.mark.parametrize(
  'axes, devices, parts',
  [
    (dict(data=-1, expert=3), 8, ('config.mesh.expert=3', 'multiply to 3', '(8)', 'data=-1')),
    (dict(data=2, expert=3), 8, ('config.mesh.data=2', 'multiply to 6', 'must equal', '(8)')),
    ({}, 8, ('config.mesh.data=1', 'multiply to 1', '(8)', 'to -1')),
  ],
)
def test_sizes_that_the_devices_do_not_have(axes, devices, parts):
  with pytest.raises(errors.InputError) as error:
    mesh_config.resolve(mesh_of(**axes), devices)
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('size', [0, -2])
@pytest.mark.parametrize('axis', mesh_config.AXES)
def test_a_size_is_positive_or_minus_1(axis, size):
  with pytest.raises(errors.InputError, match=f'config.mesh.{axis}={size} must be a number'):
    mesh_config.validate(mesh_of(**{axis: size}))


def test_only_one_axis_takes_what_is_left():
  mesh_config.validate(mesh_of(tensor=-1))
  with pytest.raises(errors.InputError, match='mesh.data and config.mesh.fsdp are both -1'):
    mesh_config.validate(mesh_of(data=-1, fsdp=-1))


def test_the_base_page_takes_all_devices():
  mesh = tiny.make().mesh
  assert mesh_config.resolve(mesh, 8)['data'] == 8
  assert not dataclasses.replace(mesh, zero1=False).zero1
