"""Who has come? Asked before JAX starts, because JAX does not say who is missing.

`jax.distributed.initialize` waits for all processes and, when one does not come, ends every other
one without a word on which. So process 0 first listens on the coordinator's own port, the others
call in with their number, host and a record of what they are about to run, and all of them hear the
same verdict: go, or one sentence that names the processes that are missing, came twice, or were
started with other settings. Then process 0 stops listening, so that JAX's coordination service can
take the port; the connections stay, see `watchdog`.

One JSON object per line each way, over TCP; callers may come in any order, early or late.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax import errors
from moe_jax.config import parse

_GREETING = 'moe_jax rendezvous'
_MAX_BYTES = 2**22  # a record is some ten kilobytes
_LISTEN_SECONDS = 5.0  # for one caller to say its line; a stranger may say nothing
_VERDICT_SECONDS = 15.0  # what a caller allows process 0 beyond its own time-out


class Present(NamedTuple):
  """All processes."""

  hosts: list[str]  # by process id
  # Process 0: to every other process; the others: to process 0.
  connections: dict[int, socket.socket]


class _Caller(NamedTuple):
  host: str
  record: Mapping[str, Any]
  connection: socket.socket | None  # None: process 0 itself


def hold(
  coordinator: str, num_processes: int, process_id: int, record: Mapping[str, Any], timeout: float
) -> Present:
  """Waits until all processes are there and agree.

  Args:
    coordinator: host:port of process 0.
    num_processes: how many are to come.
    process_id: of this one.
    record: nested dicts that JSON can hold, equal on every process.
    timeout: seconds to wait.

  Raises:
    errors.InputError: on every process that was heard, naming those at fault.
  """
  host, _, port = coordinator.rpartition(':')
  record = json.loads(json.dumps({**record, 'num_processes': num_processes}))
  if process_id == 0:
    return _collect(int(port), num_processes, record, timeout)
  return _report(host.strip('[]'), int(port), process_id, record, timeout)


def _collect(port: int, num_processes: int, record: Mapping[str, Any], timeout: float) -> Present:
  """Process 0: collects the records of the others, compares them and replies to all."""
  deadline = time.monotonic() + timeout
  present = {0: _Caller(socket.gethostname(), record, None)}
  refused = ''
  with contextlib.ExitStack() as stack, _listen(port, num_processes) as server:
    while not refused:
      present = {i: caller for i, caller in present.items() if _is_waiting(caller.connection)}
      if len(present) == num_processes:
        break
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        break
      stack.enter_context(connection)
      heard = _hear(connection)
      if heard is None:
        continue
      number, caller = heard
      old = present.get(number)
      if not 0 <= number < num_processes or (old is not None and _is_waiting(old.connection)):
        refused = _stray(number, caller, old, num_processes)
        number = -1  # hears the verdict too
      present[number] = caller
    error = refused or _missing(present, num_processes, timeout) or _differing(present)
    hosts = [present[i].host if i in present else '' for i in range(num_processes)]
    for caller in present.values():
      if caller.connection is not None:
        _answer(caller.connection, {'error': error, 'hosts': hosts})
    if error:
      raise errors.InputError(error)
    stack.pop_all()  # they stay open
  callers = {i: caller.connection for i, caller in present.items()}
  connections = {i: connection for i, connection in callers.items() if connection is not None}
  return Present(hosts, connections)


def _listen(port: int, backlog: int) -> socket.socket:
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    return socket.create_server(('', port), family=family, dualstack_ipv6=dual, backlog=backlog)
  except OSError as e:
    raise errors.InputError(
      f'--coordinator: process 0 cannot listen on port {port} ({e.strerror or e}); end what uses '
      'it (an older run, or a second process 0), or give another port to all processes'
    ) from e


def _hear(connection: socket.socket) -> tuple[int, _Caller] | None:
  """(process id, host) of a connection; None if it is not of this program (a port scanner)."""
  try:
    connection.settimeout(_LISTEN_SECONDS)
    said = json.loads(_read_line(connection))
    if said['greeting'] != _GREETING:
      return None
    return int(said['process_id']), _Caller(str(said['host']), dict(said['record']), connection)
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _is_waiting(connection: socket.socket | None) -> bool:
  """Whether the other end still listens; a process that died leaves a closed connection behind."""
  if connection is None:
    return True
  try:
    connection.setblocking(False)
    return bool(connection.recv(1, socket.MSG_PEEK))
  except BlockingIOError:
    return True
  except OSError:
    return False


def _answer(connection: socket.socket, verdict: Mapping[str, Any]):
  with contextlib.suppress(OSError):  # it is gone; JAX's own start will miss it
    connection.settimeout(_LISTEN_SECONDS)
    connection.sendall(json.dumps(verdict).encode() + b'\n')


def _stray(number: int, caller: _Caller, old: _Caller | None, num_processes: int) -> str:
  if not 0 <= number < num_processes:
    return (
      f'--process_id={number} on {caller.host} must lie between 0 and {num_processes - 1}, since '
      f'process 0 was started with --num_processes={num_processes}; start all with the same number'
    )
  assert old is not None, 'a number that is taken'
  return (
    f'--process_id={number} came twice, from {old.host} and from {caller.host}; give every process '
    f'its own number from 0 to {num_processes - 1}'
  )


def _missing(present: Mapping[int, _Caller], num_processes: int, timeout: float) -> str:
  absent = [i for i in range(num_processes) if i not in present]
  if not absent:
    return ''
  here = ', '.join(f'{i} ({present[i].host})' for i in sorted(present)[:20])
  verb = 'has' if len(absent) == 1 else 'have'
  return (
    f'{_names(absent)} of {num_processes} {verb} not come within --start_timeout={timeout:g} '
    f'seconds; here are {here}{", ..." if len(present) > 20 else ""}: see why the missing did not '
    'start, or start again with the --num_processes that there are'
  )


def _differing(present: Mapping[int, _Caller]) -> str:
  for number in sorted(present):
    changes = parse.diff(present[0].record, present[number].record)
    if changes:
      more = f' and {len(changes) - 5} more' if len(changes) > 5 else ''
      return (
        f'process {number} ({present[number].host}) was started with other settings than process 0 '
        f'({present[0].host}): {"; ".join(changes[:5])}{more}; start all processes with the same '
        'command on the same installation'
      )
  return ''


def _names(numbers: Iterable[int]) -> str:
  """[1] -> 'process 1'; [1, 2, 3, 7] -> 'processes 1-3, 7'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and runs[-1][-1] == number - 1:
      runs[-1] = [runs[-1][0], number]
    else:
      runs.append([number])
  plural = len(runs) > 1 or len(runs[0]) > 1
  text = ', '.join('-'.join(map(str, run)) for run in runs)
  return f'{"processes" if plural else "process"} {text}'


def _report(
  host: str, port: int, process_id: int, record: Mapping[str, Any], timeout: float
) -> Present:
  """Every other process: calls in, again and again, until process 0 gives its verdict."""
  deadline = time.monotonic() + timeout + _VERDICT_SECONDS
  me = {
    'greeting': _GREETING,
    'process_id': process_id,
    'host': socket.gethostname(),
    'record': record,
  }
  problem = 'it was never reached'
  while (left := deadline - time.monotonic()) > 0:
    try:
      with contextlib.ExitStack() as stack:
        connection = socket.create_connection((host, port), timeout=min(left, _LISTEN_SECONDS))
        stack.enter_context(connection)
        connection.sendall(json.dumps(me).encode() + b'\n')
        connection.settimeout(left)
        verdict = json.loads(_read_line(connection))
        error, hosts = verdict['error'], verdict['hosts']
        stack.pop_all()
    except (OSError, ValueError, KeyError, TypeError) as e:
      problem = getattr(e, 'strerror', None) or str(e) or type(e).__name__
      time.sleep(0.25)  # not there yet, or restarting
      continue
    if error:
      connection.close()
      raise errors.InputError(error)
    return Present(hosts, {0: connection})
  raise errors.InputError(
    f'process 0 did not answer process {process_id} at --coordinator={host}:{port} within '
    f'--start_timeout={timeout:g} seconds ({problem}); see that process 0 runs there and that the '
    'port is open between the machines'
  )


def _read_line(connection: socket.socket) -> bytes:
  """The first line sent; raises ValueError at the end of the stream, or of our patience."""
  line = bytearray()
  while not line.endswith(b'\n'):
    part = connection.recv(65536)
    if not part or len(line) > _MAX_BYTES:
      raise ValueError('it hung up' if not part else 'its line has no end')
    line += part
  return bytes(line)
