"""XLA's compiled programs kept on disk, so that a restart does not compile again."""

import hashlib
import os
import pathlib
import platform

import jax

MIN_COMPILE_SECONDS = 0.5  # programs that compile faster are not worth a file


def enable(root: str | os.PathLike[str]) -> pathlib.Path:
  """Keeps compiled programs below `root`, unless JAX_COMPILATION_CACHE_DIR already says where.

  One folder per set of CPU instructions: a program compiled for one host may crash on another that
  shares the home directory.

  Returns:
    The directory in use.
  """
  # pyright: ignore is needed because JAX defines its flags at run time.
  directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if directory is None:
    directory = pathlib.Path(root) / f'xla-{_host_instructions()}'
    jax.config.update('jax_compilation_cache_dir', str(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_COMPILE_SECONDS)
  return pathlib.Path(directory)


def _host_instructions() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  features = next((line for line in lines if line.startswith(('flags', 'Features'))), '')
  return hashlib.sha256(f'{platform.machine()} {features}'.encode()).hexdigest()[:12]
