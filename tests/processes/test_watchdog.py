"""What a process does when another one ends: a child beside it, over a pair of sockets."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.processes import watchdog

CHILD = """
import socket, sys, time
from moe_jax.processes import watchdog
watchdog._FIRST_GRACE_SECONDS = watchdog._GRACE_SECONDS = 0.2
number, ends = int(sys.argv[1]), sys.argv[2]
connection = socket.socket(fileno=int(sys.argv[3]))
line = watchdog.Watchdog(number, ['host0', 'host1'], {1 - number: connection}, float(sys.argv[4]))
print('started', flush=True)
if ends == 'finish':
  line.finish()
elif ends == 'fail':
  line.fail('no such file', 2)
else:
  time.sleep(20)
"""


def child(ends, says=None, number=1, heartbeat=100.0, pulse=0):
  """(exit status, what it told the other, standard error); `says` is what it hears.

  With `pulse` it hears that many times that the other process is alive, and then nothing.
  """
  ours, theirs = socket.socketpair()
  command = [sys.executable, '-c', CHILD, str(number), ends, str(theirs.fileno()), str(heartbeat)]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()]
  )
  theirs.close()
  assert process.stdout.readline() == 'started\n'
  for _ in range(pulse):
    time.sleep(heartbeat / 4)
    assert process.poll() is None
    ours.sendall(b'.\n.\n')
  if pulse:
    ends = 'frozen'
  if ends == 'wait' and says is not None:
    ours.sendall(json.dumps(says).encode() + b'\n')
  elif ends == 'wait':
    ours.close()
  try:
    _, error = process.communicate(timeout=60)
  finally:
    process.kill()
  told = b'' if ours.fileno() < 0 else ours.recv(10_000).replace(b'.\n', b'')
  ours.close()
  return process.returncode, told and json.loads(told), error


def test_who_finishes_says_so():
  assert child('finish') == (0, '', '')


def test_who_fails_tells_why_and_keeps_its_own_status():
  assert child('fail') == (2, 'process 1 (host1) ended: no such file', '')


@pytest.mark.parametrize('number', [0, 1])
def test_silence_is_a_crash_and_the_other_process_is_named(number):
  status, _, error = child('wait', number=number)
  other = 1 - number
  assert status == 1
  assert error == (
    f'error: process {other} (host{other}) was killed or has crashed, see its own output; '
    'start all processes again to go on from the newest checkpoint\n'
  )


def test_last_words_are_repeated_on_one_line():
  status, told, error = child('wait', says='process 0 (host0) ended:\n bad   input')
  assert status == 1 and told == 'process 0 (host0) ended:\n bad   input'
  assert error.startswith('error: process 0 (host0) ended: bad input; start all processes again')


@pytest.mark.parametrize('number', [0, 1])
def test_a_frozen_process_is_named_before_jax_aborts(number):
  """Its connection stands; for twice the time it says that it is alive, and then no more."""
  began = time.monotonic()
  status, told, error = child('wait', number=number, heartbeat=0.8, pulse=8)
  assert status == 1 and 1.6 < time.monotonic() - began < 10
  other = 1 - number
  assert error.startswith(f'error: process {other} (host{other}) has not answered for 1 s: it is ')
  assert error.count('\n') == 1 and 'frozen' in told


def test_who_was_frozen_itself_blames_nobody(monkeypatch):
  """The clock jumps in front of the first look, as it does when a stopped process goes on."""
  clock = iter([0.0, 0.0, 0.0, 50.0, 51.0, 52.0])
  blamed = []
  line = watchdog.Watchdog.__new__(watchdog.Watchdog)
  ours, theirs = socket.socketpair()
  line._connections, line._silence, line._over = {1: ours}, 8.0, threading.Event()

  def now():
    found = next(clock, None)
    if found is None:
      theirs.sendall(b'""\n')  # it finishes, and the watch ends
      return 53.0
    return found

  monkeypatch.setattr(watchdog.time, 'monotonic', now)
  monkeypatch.setattr(watchdog, '_BEATS', 8000)
  monkeypatch.setattr(line, '_give_up', lambda number, words: blamed.append(number), raising=False)
  line._watch()
  assert not blamed
  ours.close()
  theirs.close()
