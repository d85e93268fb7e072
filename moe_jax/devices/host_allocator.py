"""How the C library keeps the memory of a step's temporaries, so that each step need not ask anew.

XLA's programs on a CPU allocate their temporaries at each call, and glibc hands blocks of that size
back to the kernel at once: a step of the quickstart then meets 32,000 page faults, a fifth of its
time. Two ways out, both of glibc alone and with the same numbers as without:
  'huge': pages of 2 MiB (GLIBC_TUNABLES=glibc.malloc.hugetlb=1), 250 faults, no more memory. It
    must stand in the environment when a process starts, so a command starts itself once more.
  'keep': what was freed stays with the process (mallopt), no faults, but memory never shrinks, and
    with several threads its parts do not join: a third more on the quickstart. All threads share
    one heap and wait for each other, so that tokenising and compiling take twice the time: for long
    runs that compile little. It works in a process that runs already.

MOE_JAX_MALLOC=huge|keep|default chooses; unset, commands use 'huge' where the kernel has such
pages, and `moe_jax.train` and `moe_jax.load` leave the process as it is.
"""

import ctypes
import os
import pathlib
import platform
import sys

from moe_jax import errors

VARIABLE = 'MOE_JAX_MALLOC'
CHOICES = ('huge', 'keep', 'default')
TUNABLE = 'glibc.malloc.hugetlb'
_FIRST_WITH_TUNABLE = (2, 35)
_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
# Of malloc.h: parameter -> value. Nothing is mapped apart, the end of the heap is never given back,
# and all threads share one heap, so that what one has freed another finds.
_KEEP = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, 2**31 - 1), 'M_ARENA_MAX': (-8, 1)}

_state = {'kept': False}


def wanted() -> str:
  """The value of MOE_JAX_MALLOC; '' if it is not set.

  Raises:
    errors.InputError: it is none of CHOICES.
  """
  value = os.environ.get(VARIABLE, '')
  errors.require(
    not value or value in CHOICES,
    f'{VARIABLE}={value} must be one of {", ".join(CHOICES)}; unset it for the usual choice',
  )
  return value


def in_use() -> str:
  """What holds for this process: 'huge', 'keep' or 'default', for the record of a run."""
  if _state['kept']:
    return 'keep'
  return 'huge' if _is_huge(os.environ) and _glibc() >= _FIRST_WITH_TUNABLE else 'default'


def start_again_with_huge_pages():
  """Replaces this process by one of the same command line whose allocator uses huge pages.

  Does nothing where that is so already, another choice was made, the C library or the kernel has
  no such thing, or Python does not know its command line. To be called before anything large is
  imported: the command begins again.

  Raises:
    errors.InputError: see `wanted`.
  """
  if wanted() not in ('', 'huge') or _is_huge(os.environ):
    return
  if _glibc() < _FIRST_WITH_TUNABLE or not _has_huge_pages() or not sys.executable:
    return
  given = os.environ.get('GLIBC_TUNABLES')
  tunables = f'{given}:{TUNABLE}=1' if given else f'{TUNABLE}=1'
  sys.stdout.flush()
  sys.stderr.flush()
  os.execve(
    sys.executable,
    [sys.executable, *sys.orig_argv[1:]],
    {**os.environ, 'GLIBC_TUNABLES': tunables},
  )


def keep_freed_memory() -> bool:
  """Lets this process keep what it frees from now on, if it was asked to; returns whether it does.

  Does nothing where huge pages are in use or the C library is not glibc.

  Raises:
    errors.InputError: see `wanted`.
  """
  if wanted() != 'keep' or in_use() != 'default' or not _glibc():
    return _state['kept']
  libc = ctypes.CDLL(None)
  done = [libc.mallopt(parameter, value) for parameter, value in _KEEP.values()]
  _state['kept'] = all(done)
  return _state['kept']


def _is_huge(environ: os._Environ) -> bool:
  return f'{TUNABLE}=' in environ.get('GLIBC_TUNABLES', '')


def _glibc() -> tuple[int, ...]:
  """Version of glibc, (2, 36); () for any other C library."""
  name, version = platform.libc_ver()
  if name != 'glibc':
    return ()
  return tuple(int(part) for part in version.split('.')[:2])


def _has_huge_pages() -> bool:
  """Whether the kernel gives huge pages to those who ask."""
  try:
    return '[never]' not in _PAGES.read_text()
  except OSError:
    return False
