"""Runs before any test module is imported.

Several CPU devices, so that shardings can be tested; and one folder for compiled programs, shared
with the processes that tests start and between the workers of pytest-xdist, because many of them
compile the same tiny model. Compiling is most of the time here, so it is done without optimisation,
in this process. Commands that a test starts as processes compile as they do for users, unless it
takes the fixture `quick_processes`.
"""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

import jax
import pytest

from moe_jax.devices import compile_options
from tests import compile_flags

jax.config.update('jax_num_cpu_devices', 8)

_FLAGS = os.environ.get('XLA_FLAGS')
os.environ['XLA_FLAGS'] = f'{_FLAGS or ""} {compile_flags.FLAGS}'
jax.devices()  # reads the flags, once and for all
if _FLAGS is None:
  del os.environ['XLA_FLAGS']
else:
  os.environ['XLA_FLAGS'] = _FLAGS

compile_options.FIRST_STATE_LEVEL = 0  # as all that is compiled here

if 'PYTEST_XDIST_WORKER' not in os.environ:  # workers inherit the folder of the process above them
  _PROGRAMS = os.environ.get('MOE_JAX_TEST_PROGRAMS')  # of several runs of pytest, see .ci/run
  if not _PROGRAMS:
    _PROGRAMS = tempfile.mkdtemp(prefix='moe_jax_tests_')
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def pytest_collection_finish(session):
  """What is there for good is not looked through again by every collection of garbage."""
  del session
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item):
  """Where CI is late no further slow test begins; the summary says which were left out."""
  until = os.environ.get('MOE_JAX_SLOW_UNTIL')  # of time.time()
  if until and time.time() > float(until) and item.get_closest_marker('slow'):
    pytest.skip('left out, for the time')


_MAPS = pathlib.Path('/proc/self/maps')  # of Linux; elsewhere nothing is known to run out
_MANY_MAPS = 20_000  # of vm.max_map_count, 65,530 where nobody has set it


@pytest.fixture(scope='module', autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
  """What a module compiled is forgotten before the process runs out of memory maps.

  Every program that XLA:CPU compiles holds several maps. A process that reaches the kernel's count
  of them crashes in the middle of some test, with the memory half free.
  """
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > _MANY_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def quick_processes() -> Iterator[None]:
  """Processes that the tests of a module start compile as this process does."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XLA_FLAGS', compile_flags.FLAGS)
    yield
