"""Runs before any test module is imported.

Several CPU devices, so that shardings can be tested; and one folder for compiled programs, shared
with the processes that tests start and between the workers of pytest-xdist, because many of them
compile the same tiny model.
"""

import atexit
import os
import shutil
import tempfile

import jax

jax.config.update('jax_num_cpu_devices', 8)

if 'PYTEST_XDIST_WORKER' not in os.environ:  # workers inherit the folder of the process above them
  _PROGRAMS = tempfile.mkdtemp(prefix='moe_jax_tests_')
  atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
