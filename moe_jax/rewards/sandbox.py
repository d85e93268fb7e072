"""Runs programs that nobody has read, each in a process that can reach nothing.

A program runs in Linux namespaces of its own: no network, no other processes, no files but those of
Python, which are read-only, and an empty directory in memory; as nobody, with an empty environment,
and within `isolation.Limits`. When a sandbox is made, a program that tries to break out runs in it
first: unless every attempt fails, the sandbox is refused.

A program is given arguments and returns values. What the values ought to be stays in this process,
so whatever the program writes, and to whom, it cannot make itself pass.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import errors
from moe_jax.rewards import isolation, launcher, line_process, program_runner, ways_out

_ROOT = pathlib.Path(__file__).parents[2]
_SPARE_SECONDS = 20.0  # for the launcher to answer, behind the program's own time
_WAY_OUT = (
  'allow user namespaces on this machine (sysctl user.max_user_namespaces, '
  'kernel.apparmor_restrict_unprivileged_userns; in a container its seccomp profile), run as '
  'another user than root, or run programs with the rights of this process, by --unsafe_rewards or '
  'the reward program(unsafe=True)'
)
UNSAFE = (
  'NO ISOLATION (--unsafe_rewards): programs can read and write all files of this user, use the '
  'network and signal other processes; only time, memory, file size and open files are limited'
)


class SandboxError(RuntimeError):
  """The sandbox does not work any more."""


class Outcome(NamedTuple):
  """What a program claims that its function returns."""

  kind: str  # 'ran', or 'missing' (no such function), 'error', 'time', 'memory'
  results: Sequence[
    Mapping[str, Any]
  ]  # {"value": ...} or {"error": ...} of the calls, maybe too few
  why: str  # in words, if it has not run to its end


class Sandbox:
  """Runs programs, one after the other; a context that ends its processes."""

  def __init__(self, limits: isolation.Limits | None = None, *, unsafe: bool = False, by: str = ''):
    """Starts it, and tries it out.

    Args:
      limits: of a program.
      unsafe: run programs without isolation.
      by: 'namespaces', or 'bubblewrap' (the program bwrap); '' is the first of them that works.

    Raises:
      errors.InputError: this machine does not isolate programs.
      SandboxError: it does not start.
    """
    self.limits = limits or isolation.Limits()
    self._launcher: line_process.LineProcess | None = None
    ways = (
      [by] if by or unsafe else ['namespaces', *(['bubblewrap'] if shutil.which('bwrap') else [])]
    )
    for way in ways:
      self._by = way
      try:
        self.isolation = UNSAFE if unsafe else self._tried_out()
        return
      except errors.InputError:
        self.close()
        if way == ways[-1]:
          raise
      except BaseException:
        self.close()
        raise

  def run(self, source: str, entry: str, calls: Sequence[Sequence[Any]]) -> Outcome:
    """Calls a program's function.

    Args:
      source: the program, in Python.
      entry: the function's name.
      calls: positional arguments of every call, JSON values.

    Raises:
      SandboxError: the sandbox does not work any more.
      errors.InputError: this machine does not isolate programs.
    """
    answer = self._ask({'source': source, 'entry': entry, 'calls': [list(one) for one in calls]})
    return outcome(answer, len(calls), self.limits)

  def close(self):
    """Ends the processes."""
    if self._launcher is not None:
      self._launcher.close(_SPARE_SECONDS)
      self._launcher = None

  def __enter__(self) -> 'Sandbox':
    return self

  def __exit__(self, *unused: object):
    self.close()

  def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
    if self._launcher is None:
      self._launcher = self._start()
    try:
      seconds = launcher.PATIENCE * self.limits.wall_seconds + _SPARE_SECONDS
      answer = self._launcher.ask(job, seconds)
    except (line_process.DiedError, line_process.TimeOverError) as e:
      raise SandboxError(f'the launcher of programs does not work: {e}') from e
    if 'refused' in answer:
      raise errors.InputError(
        f'programs cannot be isolated on this machine: {answer["refused"]}; {_WAY_OUT}'
      )
    return answer

  def _start(self) -> line_process.LineProcess:
    python, paths = visible()
    process = line_process.LineProcess(
      [sys.executable, '-s', '-S', '-P', '-B', '-m', 'moe_jax.rewards.launcher'],
      {'PYTHONPATH': str(_ROOT)},
    )
    process.send(
      {
        'by': self._by,
        'bubblewrap': shutil.which('bwrap'),
        'limits': self.limits._asdict(),
        'python': python,
        'paths': paths,
        'runner': _source(program_runner),
      }
    )
    return process

  def _tried_out(self) -> str:
    """What isolates programs, in words, after every way out has been tried.

    Raises:
      errors.InputError: a way out is open.
    """
    with tempfile.NamedTemporaryFile() as secret, socket.create_server(('127.0.0.1', 0)) as server:
      secret.write(b'secret')
      secret.flush()
      port = server.getsockname()[1]
      given = {'port': port, 'secret': secret.name, 'pid': os.getpid(), **self.limits._asdict()}
      found = self.run(_source(ways_out), 'ways_out', [[given]])
    results = found.results[0].get('value') if found.results else None
    errors.require(
      isinstance(results, dict) and len(results) == len(ways_out.ATTEMPTS),
      f'programs cannot be isolated on this machine: the one that tries it ended with {found}; '
      f'{_WAY_OUT}',
    )
    assert isinstance(results, dict)
    still_open = [name for name, is_open in results.items() if is_open]
    errors.require(
      not still_open,
      'programs cannot be isolated on this machine: one that tried could '
      f'{", ".join(still_open)}; {_WAY_OUT}',
    )
    limits = self.limits
    return (
      f'{self._by}: own users, files, processes, network and IPC; no files but those of Python, '
      f'read-only, and an empty directory of {limits.file_bytes >> 8} KiB; no further processes; '
      f'{limits.cpu_seconds} s of CPU time, {limits.wall_seconds:g} s, {limits.memory >> 20} MiB; '
      f'tried: {len(ways_out.ATTEMPTS)} ways out, all closed'
    )


def _source(module: types.ModuleType) -> str:
  return pathlib.Path(str(module.__file__)).read_text(encoding='utf-8')


def visible() -> tuple[str, list[str]]:
  """(path of Python, what a program must see for it to run)."""
  python = os.path.realpath(getattr(sys, '_base_executable', None) or sys.executable)
  found = [path for path in isolation.PATHS if os.path.exists(path)]
  for path in (sys.base_prefix, os.path.dirname(python)):
    real = os.path.realpath(path)
    if not any(pathlib.PurePath(real).is_relative_to(one) for one in found):
      found.append(real)
  return python, found


def outcome(answer: Mapping[str, Any], num_calls: int, limits: isolation.Limits) -> Outcome:
  """The outcome of a program out of the launcher's answer.

  The kinds of failure are for the log: a program can feign them, and gains nothing by it.
  """
  lines = [parsed(text) for text in answer['lines']]
  results = [one for one in lines if one is not None]
  kind, why = 'ran', ''
  if answer['over'] == 'time':
    kind, why = 'time', f'it took longer than {limits.wall_seconds:g} s'
  elif answer['ended'] == -signal.SIGKILL and answer['cpu'] > limits.cpu_seconds / 2:
    # The kernel counts by ticks where it limits, and exactly where it reports.
    kind, why = 'time', f'it used more than {limits.cpu_seconds} s of CPU time'
  elif answer['over']:
    kind, why = 'error', f'it wrote more than {limits.output_bytes:,} bytes'
  elif len(lines) > num_calls or len(results) < len(lines):
    results, kind, why = [], 'error', 'it wrote to the descriptor of its results'
  elif results and 'missing' in results[0]:
    kind, why = 'missing', f'it has no function {results[0]["missing"]!r}'
  else:
    raised = [str(one.get('failed') or one.get('error')) for one in results if 'value' not in one]
    if raised:
      kind, why = ('memory' if raised[0].startswith('MemoryError') else 'error'), raised[0]
    elif len(results) < num_calls:
      kind, why = 'error', f'it ended with status {answer["ended"]} after {len(results)} calls'
  return Outcome(kind, results, why)


def parsed(text: str) -> dict[str, Any] | None:
  """A line of results; None if it is none, which only the program itself can have written."""
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    return None
  kinds = {'value', 'error', 'failed', 'missing'}
  return found if isinstance(found, dict) and len(found) == 1 and found.keys() <= kinds else None
