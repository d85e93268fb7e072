"""How the C library keeps the memory of a step's temporaries, so that each step need not ask anew.

XLA's programs on a CPU allocate their temporaries at each call, and glibc hands blocks of that size
back to the kernel at once: a step of the quickstart then meets 32,000 page faults, a fifth of its
time. What was freed can stay with the process instead (mallopt), which then asks for nothing more;
its memory never shrinks. Both ways to do it are of glibc alone, with the same numbers as without:
  'huge': in pages of 2 MiB (GLIBC_TUNABLES=glibc.malloc.hugetlb=1), whose addresses a CPU finds
    faster. It must stand in the environment when a process starts, so a command starts itself once
    more.
  'keep': in pages of 4 KiB. It works in a process that runs already, which is what the public API
    needs; some of what it had before is asked for again.

MOE_JAX_MALLOC=huge|keep|default chooses; unset, commands use 'huge' where the kernel has such
pages, and `moe_jax.train` and `moe_jax.load` 'keep'.
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
  if _is_huge(os.environ) and _glibc() >= _FIRST_WITH_TUNABLE:
    return 'huge'
  return 'keep' if _state['kept'] else 'default'


def start_again_with_huge_pages():
  """Replaces this process by one of the same command line whose allocator keeps huge pages.

  The new one calls this again, and keeps what it frees from then on. Does nothing where another
  choice was made, the C library or the kernel has no such thing, or Python does not know its
  command line. To be called before anything large is imported: the command begins again.

  Raises:
    errors.InputError: see `wanted`.
  """
  if wanted() not in ('', 'huge'):
    return
  if _is_huge(os.environ):
    keep_freed_memory()
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
  """Lets this process keep what it frees from now on; returns whether it does.

  Does nothing where another choice was made (huge pages are found here, not asked for), or the C
  library is not glibc.

  Raises:
    errors.InputError: see `wanted`.
  """
  asked_for_others = wanted() == 'huge' and in_use() != 'huge'
  if wanted() == 'default' or asked_for_others or not _glibc():
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
