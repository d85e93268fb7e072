"""What JAX is started with, without starting it among processes."""

import jax
import pytest

from moe_jax import errors
from moe_jax.processes import launch, rendezvous, start

FLAGS = launch.Flags(start_timeout=0.5, heartbeat_timeout=7)


def place(number=1, many=2, **changes):
  fields = dict(origin='explicit', coordinator='host0:1234', num_processes=many, process_id=number)
  return launch.Place(**(fields | {'local_device_ids': None} | changes))


@pytest.fixture
def calls(monkeypatch):
  """What was called with which arguments, in order."""
  found = []
  monkeypatch.setattr(
    rendezvous, 'hold', lambda *args: found.append(('hold', args)) or (['a', 'b'], {})
  )
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **kwargs: found.append(('initialize', kwargs))
  )
  service = jax.config.jax_enable_preemption_service
  yield found
  jax.config.update('jax_enable_preemption_service', service)


@pytest.mark.parametrize('ids', [None, (0, 2)])
def test_the_roll_is_called_first_and_jax_gets_the_place(calls, ids):
  start.initialize(place(local_device_ids=ids), FLAGS, {'seed': 1}).finish()
  (first, asked), (second, given) = calls
  assert (first, second) == ('hold', 'initialize')
  assert asked == ('host0:1234', 2, 1, {'seed': 1}, 0.5)
  assert given['coordinator_address'] == 'host0:1234'
  assert (given['num_processes'], given['process_id']) == (2, 1)
  assert given['local_device_ids'] == (None if ids is None else [0, 2])
  assert given['initialization_timeout'] == 1  # half a second is rounded up
  assert given['heartbeat_timeout_seconds'] == 21  # the watchdog's 7 seconds come first
  assert given['shutdown_timeout_seconds'] == 7
  assert given['cluster_detection_method'] == 'deactivate'
  assert not jax.config.jax_enable_preemption_service  # it would take SIGTERM for itself


def test_a_missing_process_is_known_before_jax_starts(calls, monkeypatch):
  def missing(*unused):
    raise errors.InputError('process 0 is missing')

  monkeypatch.setattr(rendezvous, 'hold', missing)
  with pytest.raises(errors.InputError, match='process 0 is missing'):
    start.initialize(place(), FLAGS, {})
  assert not calls
