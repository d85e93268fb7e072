"""Starts programs in namespaces of their own, one at a time; a process that `sandbox` talks to.

Standard input: {"by", "bubblewrap", "limits", "python", "paths", "runner"}, then a line {"source",
"entry", "calls"} per program. Standard output: per program {"lines": what it has written to its
descriptor 3, "ended": an exit status, negative for a signal, "cpu": seconds, "over": '' or the
limit that this process has enforced, 'time' or 'output'}; or {"refused": what the system does not
allow}.

"by" is 'namespaces', or 'bubblewrap', whose path is then given, or '' for no isolation. By
namespaces a program has three processes: the outer one unshares namespaces; its child is the first
process of the new one, builds the root directory and waits; the child of that is the program, which
ends with all that it has started when the first process does. This process knows no more of the
tests than the arguments of the calls, and neither does anything that it starts.
"""

import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.rewards import isolation

_ENVIRONMENT = {'PYTHONHASHSEED': '0', 'LC_ALL': 'C.UTF-8'}
PATIENCE = 3  # times its wall seconds are what a program has that computes all the while
_COMPUTES = 0.05  # seconds of CPU time since it was last looked at
_RESULTS = 3  # the program's descriptor for results


class _Launch:
  """One program on its way; every method but `start` and `watch` runs in a forked process."""

  def __init__(self, setup: Mapping[str, Any], job: Mapping[str, Any], root: str):
    self.root, self.setup, self.limits = root, setup, isolation.Limits(**setup['limits'])
    self.namespaces = setup['by'] == 'namespaces'
    self.input = os.memfd_create('job')
    processes = {'processes': 2} if setup['by'] == 'bubblewrap' else {}  # its own is one of them
    os.write(self.input, json.dumps({**job, **processes}).encode())
    os.lseek(self.input, 0, os.SEEK_SET)
    self.null = os.open(os.devnull, os.O_RDWR)
    self.results, self.results_end = os.pipe()
    self.status, self.status_end = os.pipe()  # of the trusted processes, closed to the program

  def start(self) -> int:
    """Forks the outer process and returns its number, which is that of its group."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
      ours.close()
      self._forked(lambda: self._outer(theirs))
    theirs.close()
    # Nothing is received if it has failed, and said why.
    if self.namespaces and ours.recv(1) and self._mapped(pid):
      ours.send(b'.')
    ours.close()
    for handle in (self.input, self.results_end, self.status_end, self.null):
      os.close(handle)
    return pid

  def _mapped(self, pid: int) -> bool:
    try:
      isolation.map_users(pid)
    except OSError as e:
      self._refuse(e)
      return False
    return True

  def _refuse(self, e: BaseException):
    os.write(self.status_end, json.dumps({'refused': f'{type(e).__name__}: {e}'}).encode())

  def _forked(self, action: Callable[[], object]):
    """Ends a forked process behind its action; what goes wrong is told as the status."""
    try:
      action()
    except BaseException as e:
      self._refuse(e)
    finally:
      os._exit(0)

  def _outer(self, launcher: socket.socket):
    os.setsid()
    isolation.die_with_parent()
    if not self.namespaces:
      self._first()
      return
    isolation.unshare()
    isolation.die_with_parent()  # a change of rights has taken it away
    launcher.send(b'.')
    if not launcher.recv(1):
      return
    pid = os.fork()
    if pid == 0:
      self._forked(self._first)
    for handle in (self.results_end, self.status_end):
      os.close(handle)
    os.waitpid(pid, 0)

  def _first(self):
    processes = None
    if self.namespaces:
      isolation.die_with_parent()
      isolation.enter_root(self.root, self.setup['paths'], 4 * self.limits.file_bytes)
      processes = 1 if os.getuid() == 0 else 3  # the two others are of the same user
    else:
      os.chdir(self.root)
    pid = os.fork()
    if pid == 0:
      self._forked(lambda: self._program(processes))
    os.close(self.results_end)
    _, status, usage = os.wait4(pid, 0)
    ended = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    if self.setup['by'] == 'bubblewrap' and ended > 128:
      ended = 128 - ended  # so it says that what it ran has died of a signal
      cpu = self.limits.cpu_seconds if ended == -signal.SIGKILL else cpu  # which it does not count
    os.write(self.status_end, json.dumps({'ended': ended, 'cpu': cpu}).encode())

  def _program(self, processes: int | None):
    for handle, target in ((self.input, 0), (self.null, 1), (self.null, 2)):
      os.dup2(handle, target)
    if self.results_end != _RESULTS:
      os.dup2(self.results_end, _RESULTS)
    os.set_inheritable(_RESULTS, True)
    # `status_end` closes itself with the exec.
    if self.namespaces:
      isolation.drop_privileges()
    elif not self.setup['by']:
      isolation.forbid_privileges()
    isolation.limit(self.limits, processes)
    command = [self.setup['python'], '-s', '-S', '-P', '-B', '-c', self.setup['runner']]
    if self.setup['by'] == 'bubblewrap':
      box = 4 * self.limits.file_bytes
      prefix = (self.setup['bubblewrap'], self.setup['paths'], box, _ENVIRONMENT)
      command = isolation.bubblewrap(*prefix) + command
    os.execve(command[0], command, _ENVIRONMENT)

  def watch(self, group: int) -> dict[str, Any]:
    """What has become of the program, which is ended at its limits."""
    wall, used = self.limits.wall_seconds, 0.0
    until, more_times = time.monotonic() + wall, PATIENCE - 1  # counted: sums of times are rounded
    read = {self.results: b'', self.status: b''}
    over = ''
    with selectors.DefaultSelector() as selector:
      for handle in read:
        selector.register(handle, selectors.EVENT_READ)
      # The results may stay open behind the program's end, if it has left processes behind.
      while not over and self.status in selector.get_map():
        events = selector.select(max(until - time.monotonic(), 0.0))
        for key, _ in events:
          more = os.read(key.fd, 2**16)
          read[key.fd] += more
          if not more:
            selector.unregister(key.fd)
        if len(read[self.results]) > self.limits.output_bytes:
          over = 'output'
        elif not events:
          before, used = used, cpu_seconds(group)
          computes = used > before + _COMPUTES and more_times > 0
          more_times -= 1
          over, until = ('', until + wall) if computes else ('time', until)
    end(group)
    return self._answer(read[self.results], read[self.status], over)

  def _answer(self, results: bytes, status: bytes, over: str) -> dict[str, Any]:
    os.set_blocking(self.results, False)
    while not over and (more := _read(self.results)):
      results += more
      if len(results) > self.limits.output_bytes:
        over = 'output'
    for handle in (self.results, self.status):
      os.close(handle)
    found = {'ended': -signal.SIGKILL, 'cpu': 0.0} | (json.loads(status) if status else {})
    if 'refused' in found:
      return {'refused': found['refused']}
    lines = [] if over == 'output' else results.decode('utf-8', 'replace').splitlines()
    return {'lines': lines, 'over': over} | found


def _read(handle: int) -> bytes:
  try:
    return os.read(handle, 2**16)
  except BlockingIOError:
    return b''


def cpu_seconds(pid: int) -> float:
  """CPU time of a process and of those that it has started and that still run."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      fields = file.read().rpartition(')')[2].split()
    with open(f'/proc/{pid}/task/{pid}/children') as file:
      children = file.read().split()
  except OSError:  # it has ended meanwhile
    return 0.0
  own = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  return own + sum(cpu_seconds(int(child)) for child in children)


def end(group: int):
  """Ends a group of processes, and waits for the one that has begun it."""
  try:
    os.killpg(group, signal.SIGKILL)
  except ProcessLookupError:  # it has not come to be a group yet
    os.kill(group, signal.SIGKILL)
  os.waitpid(group, 0)


def main():
  """Runs programs until standard input ends."""
  setup = json.loads(sys.stdin.readline())
  for line in sys.stdin:
    with tempfile.TemporaryDirectory(prefix='moe_jax_program_') as root:
      launch = _Launch(setup, json.loads(line), root)
      answer = launch.watch(launch.start())
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
