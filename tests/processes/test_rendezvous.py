"""The rendezvous and the watchdog over real sockets, the processes being threads or children."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from moe_jax import errors
from moe_jax.processes import rendezvous

RECORD = {'config': {'optim': {'peak_lr': 1e-3}}, 'versions': {'jax': '0.10.2'}}


@pytest.fixture
def address():
  with socket.socket() as s:
    s.bind(('', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def outcomes(address, ids, num_processes=3, timeout=10.0, records=None):
  """Holds the rendezvous in one thread per process; the `Present` or the error text of each."""

  def hold(i, number):
    try:
      record = (records or {}).get(i, RECORD)
      return rendezvous.hold(address, num_processes, number, record, timeout)
    except errors.InputError as e:
      return str(e)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(hold, range(len(ids)), ids))


def test_all_present(address):
  found = outcomes(address, [2, 0, 1])
  host = socket.gethostname()
  assert all(present.hosts == [host] * 3 for present in found)
  assert sorted(found[1].connections) == [1, 2]
  assert list(found[0].connections) == list(found[2].connections) == [0]
  # The connections stay and lead to the right process; the port takes a new listener meanwhile.
  found[1].connections[2].sendall(b'x')
  assert found[0].connections[0].recv(1) == b'x'
  with socket.create_server(('', int(address.rpartition(':')[2]))):
    pass
  for present in found:
    for connection in present.connections.values():
      connection.close()


@pytest.mark.parametrize(
  'ids, missing',
  [([0, 1], 'process 2 of 3 has'), ([0], 'processes 1-2 of 3 have')],
)
def test_the_missing_are_named(address, ids, missing):
  for text in outcomes(address, ids, timeout=0.5):
    assert text.startswith(f'{missing} not come within --start_timeout=0.5 seconds; here are 0 (')
    assert '--num_processes' in text


def test_without_process_0_the_address_is_named(address, monkeypatch):
  monkeypatch.setattr(rendezvous, '_VERDICT_SECONDS', 0.0)
  (text,) = outcomes(address, [1], timeout=0.5)
  assert text.startswith(f'process 0 did not answer process 1 at --coordinator={address} within')


def test_another_config_is_named_by_key_and_process(address):
  other = {'config': {'optim': {'peak_lr': 2e-3}}, 'versions': {'jax': '0.10.2'}}
  for text in outcomes(address, [0, 1, 2], records={2: other}):
    assert text.startswith('process 2 (') and 'than process 0 (' in text
    assert 'config.optim.peak_lr: 0.001 -> 0.002;' in text


def test_one_number_twice(address):
  # Whoever comes last learns nothing but that process 0 has gone; the others hear the reason.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(outcomes, address, [0, 1], 3)
    time.sleep(0.5)
    second = pool.submit(outcomes, address, [1], 3)
    for text in (*first.result(), *second.result()):
      assert text.startswith('--process_id=1 came twice, from ')


def test_a_number_too_high(address):
  text = outcomes(address, [0, 5])[0]
  assert text.startswith('--process_id=5 on ') and 'between 0 and 2' in text


def connection(host: str, port: int) -> socket.socket:
  """A connection to who will listen there within 20 seconds."""
  give_up = time.monotonic() + 20
  while True:
    try:
      return socket.create_connection((host, port))
    except ConnectionRefusedError:
      assert time.monotonic() < give_up
      time.sleep(0.05)


def test_strangers_and_restarted_processes_do_no_harm(address):
  """A port scanner; a process that dies while it waits, and comes again."""
  host, _, port = address.partition(':')
  greeting = {'greeting': 'moe_jax rendezvous', 'process_id': 1, 'host': 'old', 'record': RECORD}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(outcomes, address, [0])
    for line in (b'GET / HTTP/1.1\r\n\r\n', json.dumps(greeting).encode() + b'\n'):
      with connection(host, int(port)) as stranger:
        stranger.sendall(line)
        time.sleep(0.1)
    second, third = outcomes(address, [1, 2])
    for present in (*first.result(), second, third):
      assert present.hosts == [socket.gethostname()] * 3


def test_a_taken_port_is_named(address):
  with socket.create_server(('', int(address.rpartition(':')[2]))):
    (text,) = outcomes(address, [0])
  assert text.startswith('--coordinator: process 0 cannot listen on port ')


CHILD = """
import sys, time
from moe_jax.processes import rendezvous, watchdog
number, address, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
line = watchdog.Watchdog(number, *rendezvous.hold(address, 3, number, {}, 20))
print('started', flush=True)
if what == 'fail':
  line.fail('bad input', 2)
elif what == 'finish':
  line.finish()
else:
  time.sleep(30)
"""


def children(address, *what):
  command = [sys.executable, '-c', CHILD]
  return [
    subprocess.Popen(
      [*command, str(i), address, word],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    for i, word in enumerate(what)
  ]


def test_a_killed_process_is_named_by_the_others(address):
  processes = children(address, 'wait', 'wait', 'wait')
  for process in processes:
    assert process.stdout.readline() == 'started\n'
  begin = time.monotonic()
  processes[1].kill()
  for number in (0, 2):
    _, err = processes[number].communicate(timeout=20)
    assert processes[number].returncode == 1
    assert err.startswith('error: process 1 (') and 'was killed or has crashed' in err
  assert time.monotonic() - begin < 10
  processes[1].communicate()


def test_a_failed_process_says_why_and_a_finished_one_nothing(address):
  processes = children(address, 'wait', 'finish', 'fail')
  outputs = [process.communicate(timeout=20) for process in processes]
  assert [process.returncode for process in processes] == [1, 0, 2]
  assert 'process 2 (' in outputs[0][1] and 'ended: bad input' in outputs[0][1]
  assert outputs[1][1] == outputs[2][1] == ''
