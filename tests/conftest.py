"""Runs before any test module is imported.

Several CPU devices, so that shardings can be tested; and one folder for compiled programs, shared
with the processes that tests start and between the workers of pytest-xdist, because many of them
compile the same tiny model. Compiling is most of the time here, so it is done without optimisation,
in this process only: commands that tests start as processes compile as they do for users.
"""

import atexit
import os
import shutil
import tempfile

import jax

jax.config.update('jax_num_cpu_devices', 8)

_FLAGS = os.environ.get('XLA_FLAGS')
os.environ['XLA_FLAGS'] = f'{_FLAGS or ""} --xla_backend_optimization_level=0'
jax.devices()  # reads the flags, once and for all
if _FLAGS is None:
  del os.environ['XLA_FLAGS']
else:
  os.environ['XLA_FLAGS'] = _FLAGS

if 'PYTEST_XDIST_WORKER' not in os.environ:  # workers inherit the folder of the process above them
  _PROGRAMS = tempfile.mkdtemp(prefix='moe_jax_tests_')
  atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
