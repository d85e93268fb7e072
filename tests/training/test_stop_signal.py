import signal

import pytest

from moe_jax.training import stop_signal


def test_the_first_signal_is_noted_and_the_second_ends_the_program():
  before = signal.getsignal(signal.SIGTERM)
  with stop_signal.StopSignal() as stop:
    assert stop.name == ''
    signal.raise_signal(signal.SIGTERM)
    assert stop.name == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGTERM) == before
