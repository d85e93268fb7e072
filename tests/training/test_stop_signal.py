import concurrent.futures
import signal

from moe_jax.training import stop_signal


def test_the_first_signal_is_noted_and_later_ones_change_nothing(capfd):
  before = {number: signal.getsignal(number) for number in stop_signal.SIGNALS}
  with stop_signal.StopSignal() as stop:
    assert stop.name == ''
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.raise_signal(number)
      assert stop.name == 'SIGTERM'
  assert {number: signal.getsignal(number) for number in stop_signal.SIGNALS} == before
  (line,) = capfd.readouterr().err.split('\n')[1:-1]
  assert line.startswith('SIGTERM: the run ends after the step in progress')


def test_a_terminal_that_closes_stops_a_run_unless_nohup_said_otherwise():
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_signal.StopSignal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert stop.name == ''
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_signal.StopSignal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert stop.name == 'SIGHUP'
  finally:
    signal.signal(signal.SIGHUP, old)


def test_in_another_thread_a_run_goes_without_signals_and_says_so(caplog):
  def enter():
    with stop_signal.StopSignal() as stop:
      return stop.name

  before = signal.getsignal(signal.SIGTERM)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    assert pool.submit(enter).result() == ''
  assert signal.getsignal(signal.SIGTERM) == before
  assert 'thread that is not the main one' in caplog.text
