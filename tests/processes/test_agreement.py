"""One process by itself, and what several would decide with the transport between them replaced.

Real processes agree in tests/processes/test_as_one.py and test_interrupted.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from moe_jax import errors
from moe_jax.processes import agreement
from tests import tiny


@pytest.fixture
def as_three(monkeypatch):
  """Process 1 of three: sets what the other two contribute, from what this one does."""

  def others(change):
    def gather(value, tiled=False):
      mine = np.asarray(value)
      return np.stack([change(0, mine), mine, change(2, mine)])

    monkeypatch.setattr(multihost_utils, 'process_allgather', gather)

  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  others(lambda number, mine: mine)
  return others


def text_of(text):
  line = np.zeros(agreement._TEXT_BYTES, np.uint8)
  line[: len(text)] = np.frombuffer(text.encode(), np.uint8)
  return line


def test_one_process_is_the_first_and_waits_for_nobody():
  assert agreement.is_first()
  agreement.wait_for_all()
  agreement.require_same({'the text': 1})
  with pytest.raises(errors.InputError, match='^bad$'), agreement.together():
    raise errors.InputError('bad')


def test_the_same_values_are_the_same_in_any_order_of_keys(as_three):
  assert not agreement.is_first()
  agreement.require_same({'the text': {'a': 1, 'b': 2}, 'versions': [1]})


def test_a_value_that_differs_is_named_with_the_processes(as_three):
  def change(number, mine):
    return mine if number == 0 else mine ^ np.array([[0], [1]], np.uint8)  # the second value

  as_three(change)
  with pytest.raises(errors.InputError, match='versions is not the same on process 0 and .* 2;'):
    agreement.require_same({'the text': 1, 'versions': 2})


@pytest.mark.parametrize(
  'mine, theirs, want',
  [
    ('', '', ''),
    ('', 'no file a', 'process 2: no file a'),
    ('no file b', 'no file a', 'no file b'),  # whoever has words of its own keeps them
  ],
)
def test_bad_input_of_one_stops_all(as_three, mine, theirs, want):
  as_three(lambda number, unused: text_of(theirs if number == 2 else ''))

  def run():
    with agreement.together():
      if mine:
        raise errors.InputError(mine)

  if not want:
    run()
    return
  with pytest.raises(errors.InputError) as error:
    run()
  assert str(error.value) == want


def test_other_errors_pass_through(as_three):
  with pytest.raises(KeyError), agreement.together():
    raise KeyError('x')


def test_a_signal_is_agreed_on_some_steps_later(monkeypatch):
  lag = 2
  stop = agreement.StopAgreement(tiny.mesh(data=2), lag)
  assert stop.after_step('SIGTERM') == 'SIGTERM'  # alone: at once
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  found = [stop.after_step(name) for name in ('', 'SIGTERM', 'SIGTERM', 'SIGTERM', 'SIGTERM')]
  # The flag of step i is read at step i + lag: that of step 0 was empty.
  assert found == [''] * (1 + lag) + ['SIGTERM'] * (4 - lag)


def test_arrays_of_any_sharding_become_numpy():
  mesh = tiny.mesh(data=4)
  split = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P('data')))
  found = agreement.fetch({'split': split, 'number': 3, 'array': np.ones(2)})
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
  assert found['split'].tolist() == list(range(8)) and found['number'] == 3
