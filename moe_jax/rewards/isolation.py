"""Linux namespaces, an own root directory, dropped privileges and limits, through system calls.

`launcher` uses these, step by step, between its forks; each raises OSError where the system refuses
it. Nothing here imports more than the standard library.
"""

import ctypes
import os
import resource
from collections.abc import Mapping, Sequence
from typing import NamedTuple

BOX = '/box'  # the program's directory: empty, and in memory
OUTER_UID = 65534  # nobody; who a program of root's is outside of its namespace
INNER_UID = 1  # who it is inside
PATHS = ('/usr', '/lib', '/lib32', '/lib64', '/bin', '/nix/store', '/gnu/store')  # for Python

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
_NEWPID, _NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_SET_PDEATHSIG, _CAPBSET_READ, _CAPBSET_DROP = 1, 23, 24
_SET_SECUREBITS, _NO_NEW_PRIVS = 28, 38
_SECURE_NO_ROOT = 0b101111  # root is nobody special, and that stays so
_CAPABILITY_VERSION = 0x20080522
_SIGKILL = 9


class Limits(NamedTuple):
  """What a program may use."""

  cpu_seconds: int = 2  # whoever uses more is too slow, on a busy machine as on an idle one
  # Whoever sleeps for longer is ended; who computes, on a busy machine, has three times as long.
  wall_seconds: float = 6.0
  memory: int = 2**28  # bytes of address space
  file_bytes: int = 2**20  # of a file; all files together may have four times as many
  open_files: int = 32
  output_bytes: int = 2**20  # of all results as JSON


def _check(result: int, what: str):
  if result != 0:
    number = ctypes.get_errno()
    raise OSError(number, f'{what}: {os.strerror(number)}')


def _libc() -> ctypes.CDLL:
  return ctypes.CDLL(None, use_errno=True)


def die_with_parent():
  """Has the kernel end this process when its parent ends."""
  _check(_libc().prctl(_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), 'prctl PR_SET_PDEATHSIG')


def unshare():
  """Puts this process in new namespaces, and its next child in a new one of processes."""
  flags = _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
  _check(_libc().unshare(flags), 'unshare of user, mount, process, network and IPC namespaces')


def map_users(pid: int):
  """Says who the users of a process's new namespace are outside; called from outside.

  Where root may give it two, the program becomes nobody, since limits on processes do not hold for
  root. Else it is the caller under another number.
  """
  own = os.geteuid(), os.getegid()
  pairs = [f'0 {i} 1\n{INNER_UID} {OUTER_UID} 1\n' for i in own]
  try:
    if own[0] != 0:
      raise PermissionError
    _write(pid, 'uid_map', pairs[0])
    _write(pid, 'gid_map', pairs[1])
  except PermissionError:
    _write(pid, 'setgroups', 'deny')
    _write(pid, 'uid_map', f'{INNER_UID} {own[0]} 1\n')
    _write(pid, 'gid_map', f'{INNER_UID} {own[1]} 1\n')


def _write(pid: int, name: str, text: str):
  with open(f'/proc/{pid}/{name}', 'w') as file:
    file.write(text)


def enter_root(root: str, paths: Sequence[str], box_bytes: int):
  """Makes `root` the root directory of this process: `paths`, read-only, and an empty BOX.

  Args:
    root: an empty directory.
    paths: what stays visible, under its own name.
    box_bytes: that all files in BOX may have together.
  """
  libc = _libc()
  inside = _MS_NOSUID | _MS_NODEV

  def mount(source: str, target: str, kind: str, flags: int, options: str = ''):
    values = (one.encode() for one in (source, target, kind))
    _check(libc.mount(*values, flags, options.encode()), f'mount {kind or source} on {target}')

  mount('none', '/', '', _MS_REC | _MS_PRIVATE)
  mount('tmpfs', root, 'tmpfs', inside, 'size=64k,mode=755')
  for path in paths:
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
      os.symlink(os.readlink(path), target)
    else:
      os.makedirs(target, exist_ok=True)
      mount(path, target, '', _MS_BIND | _MS_REC)
      _read_only(libc, target, recursive=True)
  os.mkdir(root + BOX)
  mount('tmpfs', root + BOX, 'tmpfs', inside, f'size={box_bytes},nr_inodes=64,mode=777')
  _read_only(libc, root, recursive=False)
  os.chroot(root)
  os.chdir(BOX)


def bubblewrap(
  program: str, paths: Sequence[str], box_bytes: int, environment: Mapping[str, str]
) -> list[str]:
  """The command line of bubblewrap that does what `unshare`, `enter_root` and the rest do.

  Args:
    program: path of bubblewrap, which some systems allow what they allow nobody else.
    paths: see `enter_root`.
    box_bytes: see `enter_root`.
    environment: of what is run.
  """
  found = [program, '--unshare-all', '--unshare-user', '--die-with-parent', '--new-session']
  found += ['--cap-drop', 'ALL', '--uid', str(INNER_UID), '--gid', str(INNER_UID), '--clearenv']
  for name, value in environment.items():
    found += ['--setenv', name, value]
  for path in paths:
    link = os.path.islink(path)
    found += ['--symlink', os.readlink(path), path] if link else ['--ro-bind', path, path]
  found += ['--size', str(box_bytes), '--tmpfs', BOX, '--remount-ro', '/', '--chdir', BOX, '--']
  return found


def _read_only(libc: ctypes.CDLL, path: str, *, recursive: bool):
  class Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ('set', 'clear', 'propagation', 'userns')]

  wanted = Attributes(_ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
  flags = _AT_RECURSIVE if recursive else 0
  size = ctypes.c_size_t(ctypes.sizeof(wanted))
  call = (_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), size)
  _check(libc.syscall(*call), f'mount_setattr of {path}')


def drop_privileges():
  """Makes this process the program's user, and takes every capability from it for good."""
  libc = _libc()
  _check(libc.prctl(_SET_SECUREBITS, _SECURE_NO_ROOT, 0, 0, 0), 'prctl PR_SET_SECUREBITS')
  capability = 0
  while libc.prctl(_CAPBSET_READ, capability, 0, 0, 0) >= 0:
    _check(libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0), 'prctl PR_CAPBSET_DROP')
    capability += 1
  if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(INNER_UID, INNER_UID, INNER_UID)
    os.setresuid(INNER_UID, INNER_UID, INNER_UID)
  header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
  _check(libc.capset(header, (ctypes.c_uint32 * 6)()), 'capset')
  forbid_privileges()


def forbid_privileges():
  """Lets no program that this process starts have more rights than it has."""
  _check(_libc().prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), 'prctl PR_SET_NO_NEW_PRIVS')


def limit(limits: Limits, processes: int | None):
  """Sets the limits of this process and of all that it starts.

  Args:
    limits: what it may use.
    processes: how many its user may have, this one included; None for as many as before.
  """
  for name, most in (
    ('CPU', limits.cpu_seconds),
    ('AS', limits.memory),
    ('FSIZE', limits.file_bytes),
    ('NOFILE', limits.open_files),
    *((('NPROC', processes),) if processes is not None else ()),
    ('CORE', 0),
    ('MEMLOCK', 0),
    ('MSGQUEUE', 0),
  ):
    resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (most, most))
