import jax
import jax.numpy as jnp
import pytest

from moe_jax.devices import partitioning
from moe_jax.models.exchange import EXCHANGES, buffers
from tests import tiny
from tests.models.exchange import operands


@pytest.mark.parametrize(
  'groups, limit, devices, fan',
  [
    (1, 1, 4, 3),
    (1, 1, 2, 2),
    (4, 2, 4, 2),
    (2, 1, 4, 2),
    (4, 2, 2, 2),
    (4, 2, 8, 3),
    (1, 1, 8, 3),
  ],
)
def test_device_limited_routing_bounds_the_copies(groups, limit, devices, fan):
  """Groups of 8 / 4 = 2 experts: on two of 8 devices; a group of 4 spans two of 4 devices."""
  assert buffers.fan_out(operands.config_of(groups=groups, limit=limit), operands.K, devices) == fan


def rows_of(fn, primitive):
  """How many rows of width D each use of a collective gets in the traced program."""
  with partitioning.activate(operands.MESH()):
    jaxpr = jax.make_jaxpr(fn.traced)(operands.choices('random'), *operands.operands())
  return {
    v.aval.shape[0]
    for eqn in tiny.equations(jaxpr.jaxpr)
    if eqn.primitive.name == primitive
    for v in eqn.invars
    if v.aval.shape[1:] == (operands.D,)
  }


def test_device_limited_routing_shows_in_the_bytes():
  """Two of four groups: two copies of a token travel instead of three; ids as well as states."""
  back = operands.P * operands.T  # the emulation also gathers the buffer that received
  free, limited = (
    operands.run('ragged_all_to_all'),
    operands.run('ragged_all_to_all', groups=4, limit=2),
  )
  assert rows_of(free, 'all_gather') == {operands.T * 3, back}
  assert rows_of(limited, 'all_gather') == {operands.T * 2, back}
  free, limited = (
    operands.run('all_to_all', factor=1.0),
    operands.run('all_to_all', factor=1.0, groups=4, limit=2),
  )
  assert rows_of(free, 'all_to_all') == {operands.P * 5}  # 6 * 3 / 4, rounded up, for each device
  assert rows_of(limited, 'all_to_all') == {operands.P * 3}


def test_no_token_is_scattered():
  """With the products of accelerators: states are only ever gathered."""
  for kind in EXCHANGES:
    with partitioning.activate(operands.MESH()):
      jaxpr = jax.make_jaxpr(operands.run(kind, backend='ragged_dot').traced)(
        operands.choices('random'), *operands.operands()
      )
    for eqn in tiny.equations(jaxpr.jaxpr):
      if eqn.primitive.name.startswith('scatter'):
        assert eqn.outvars[0].aval.dtype == jnp.int32, kind


@pytest.mark.parametrize('devices', [2, 4, 5, 10])
def test_no_token_needs_more_devices_than_the_fan(devices):
  """2 groups of 10 experts, also where a device holds parts of both."""
  sizes = dict(num_experts=20, num_experts_per_tok=8, num_expert_groups=2, num_limited_groups=1)
  cfg = tiny.make(**{f'model__moe__{key}': value for key, value in sizes.items()}).model.moe
  owner = [expert // (20 // devices) for expert in range(20)]
  needed = max(len(set(owner[:10])), len(set(owner[10:])))
  fan = buffers.fan_out(cfg, 8, devices)
  assert min(needed, 8) <= fan <= needed + 1
