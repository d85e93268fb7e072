import fcntl
import os
import signal
import subprocess
import types

import pytest

from moe_jax.rewards import isolation, launcher

SETUP = {'limits': isolation.Limits(wall_seconds=0.2, output_bytes=20)._asdict(), 'by': ''}


@pytest.fixture
def launch(monkeypatch):
  """A launch of nothing, whose pipes the test writes to."""
  ended = []
  monkeypatch.setattr(launcher, 'end', ended.append)
  one = launcher._Launch(SETUP, {'source': 'ä'}, '/')
  assert os.read(one.input, 99) == b'{"source": "\\u00e4"}'
  one.ended = ended
  yield one
  for handle in (one.input, one.null):
    os.close(handle)


def test_what_is_written_and_how_it_ended(launch):
  os.write(launch.results_end, b'{"value": 1}\n')
  os.write(launch.status_end, b'{"ended": -11, "cpu": 0.5}')
  os.close(launch.status_end)  # the results stay open: a process may have been left behind
  found = launch.watch(7)
  assert found == {'lines': ['{"value": 1}'], 'over': '', 'ended': -11, 'cpu': 0.5}
  assert launch.ended == [7]
  os.close(launch.results_end)


def test_who_takes_too_long_is_ended(launch):
  found = launch.watch(7)
  assert (found['over'], found['ended'], launch.ended) == ('time', -signal.SIGKILL, [7])
  os.close(launch.results_end)
  os.close(launch.status_end)


@pytest.mark.parametrize('cpu, waits', [((1.0, 2.0, 3.0), 3), ((1.0, 1.01), 2), ((0.0,), 1)])
def test_who_computes_has_three_times_as_long(launch, monkeypatch, cpu, waits):
  """A busy machine is no reason to fail; who sleeps has no excuse."""
  asked = []

  def cpu_seconds(pid):
    asked.append(pid)
    return cpu[len(asked) - 1]

  monkeypatch.setattr(launcher, 'cpu_seconds', cpu_seconds)
  # A time to which 0.2 three times is more than 3 * 0.2.
  clock = types.SimpleNamespace(monotonic=lambda: 10794.568592657 + 0.2 * len(asked))
  monkeypatch.setattr(launcher, 'time', clock)
  assert launch.watch(7)['over'] == 'time' and asked == [7] * waits
  os.close(launch.results_end)
  os.close(launch.status_end)


def test_cpu_time_is_that_of_the_children_too(tmp_path):
  before = launcher.cpu_seconds(os.getpid())
  assert before > 0.1 and launcher.cpu_seconds(2**22) == 0
  loop = 'i=0; while [ $i -lt 99999 ]; do i=$((i + 1)); done; echo; exec sleep 99'
  with subprocess.Popen(['sh', '-c', loop], stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    assert launcher.cpu_seconds(child.pid) > 0
    assert launcher.cpu_seconds(os.getpid()) >= before + launcher.cpu_seconds(child.pid)
    child.kill()


@pytest.mark.parametrize('before', [True, False])
def test_who_writes_too_much_has_written_nothing(launch, before):
  """Seen while it runs, or only when it has ended."""
  if not before:
    os.write(launch.status_end, b'{"ended": 0, "cpu": 0.1}')
    os.close(launch.status_end)
  os.write(launch.results_end, b'{"value": 1}\n' * 2)
  found = launch.watch(7)
  assert found['lines'] == [] and found['over'] == 'output'
  os.close(launch.results_end)
  if before:
    os.close(launch.status_end)


def test_what_is_read_behind_the_end_counts_too(launch):
  """Two reads of 64 KiB see the status and its end; the rest of the results comes after."""
  launch.limits = launch.limits._replace(output_bytes=150_000)
  fcntl.fcntl(launch.results_end, fcntl.F_SETPIPE_SZ, 2**18)
  os.write(launch.results_end, b'x' * 180_000)
  os.write(launch.status_end, b'{"ended": 0, "cpu": 0.1}')
  os.close(launch.status_end)
  found = launch.watch(7)
  assert (found['over'], found['ended'], found['lines']) == ('output', 0, [])
  os.close(launch.results_end)


def test_what_the_system_refuses_is_told(launch, monkeypatch):
  left = []
  monkeypatch.setattr(os, '_exit', left.append)

  def action():
    raise PermissionError(1, 'unshare')

  launch._forked(action)
  os.close(launch.status_end)
  os.close(launch.results_end)
  assert launch.watch(7) == {'refused': 'PermissionError: [Errno 1] unshare'} and left == [0]
