"""The program that a sandbox runs first: it tries what no program may do.

It runs inside, so it imports nothing of this library.
"""

import ctypes
import os
import socket
from collections.abc import Mapping
from typing import Any

ATTEMPTS = (
  'see files of this machine',
  'read a file of this process',
  'begin in a directory that is not empty',
  'write to its root directory',
  'write to the files of Python',
  'write a large file',
  'write many files',
  'connect to this process',
  'see a network',
  'see this process',
  'start a process',
  'take more memory',
  'open many files',
  'become root',
  'keep a right of root',
  'read an environment',
)
_CAPBSET_READ, _CAP_SYS_ADMIN, _GET_NO_NEW_PRIVS = 23, 21, 39
_HARMLESS = {'PYTHONHASHSEED', 'LC_ALL', 'LC_CTYPE', 'PWD'}  # ours, Python's, bubblewrap's


def ways_out(given: Mapping[str, Any]) -> dict[str, bool]:
  """Of every attempt whether it went well.

  Args:
    given: the limits of `isolation.Limits`, and of the process outside "port", on which it listens,
      "pid", and "secret", a file.
  """
  found = {}
  for name, attempt in zip(ATTEMPTS, _attempts(given), strict=True):
    try:
      found[name] = bool(attempt())
    except (OSError, MemoryError):
      found[name] = False
  return found


def _attempts(given: Mapping[str, Any]):
  size, paths = given['file_bytes'], ('/etc', '/proc', '/sys', '/dev', '/var')
  return (
    lambda: any(os.path.exists(path) for path in paths),
    lambda: _opened(given['secret']),
    lambda: os.listdir('.') or os.getcwd() == '/',
    lambda: _written('/file', 1),
    lambda: not os.statvfs(os.__file__).f_flag & os.ST_RDONLY or _written(f'{os.__file__}.x', 1),
    lambda: _written('large', size + 1),
    lambda: all([_written(f'part{i}', size // 2) for i in range(9)]),
    lambda: socket.create_connection(('127.0.0.1', given['port']), 2),
    lambda: [name for _, name in socket.if_nameindex()] != ['lo'],
    lambda: os.getppid() != 1 or _seen(given['pid']),
    _forked,
    lambda: bytearray(given['memory']),
    lambda: [os.dup(0) for _ in range(given['open_files'])],
    lambda: os.getuid() == 0 or os.setuid(0) is None,
    _privileged,
    lambda: os.environ.keys() - _HARMLESS,
  )


def _opened(path: str) -> bool:
  with open(path, 'rb') as file:
    return bool(file.read())


def _written(path: str, size: int) -> bool:
  with open(path, 'wb') as file:
    return file.write(bytes(size)) == size


def _seen(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it may not be signalled, but it is there
    return True
  return True


def _privileged() -> bool:
  read = ctypes.CDLL(None).prctl
  return (
    read(_CAPBSET_READ, _CAP_SYS_ADMIN, 0, 0, 0) != 0 or read(_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1
  )


def _forked() -> bool:
  if os.fork() == 0:
    os._exit(0)
  return True
