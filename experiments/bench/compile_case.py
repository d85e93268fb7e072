"""Traces and compiles one train step in a process of its own; prints what that took as JSON.

python -m experiments.bench.compile_case < config.json
"""

import json
import resource
import sys
import time

import jax

from moe_jax import config, partitioning
from moe_jax.analysis import aot


def measure(cfg: config.Config, warm_up: config.Config) -> dict[str, float]:
  """Seconds of tracing and of compiling, and by how much they raised the process's peak memory.

  A small model is traced first, so that what Python imports on the way is left out; what JAX then
  remembers of it is cleared. The cache of compiled programs is off.
  """
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    mesh = partitioning.make_mesh(cfg.mesh)
    aot.lower_train(warm_up, mesh, None)
    jax.clear_caches()
    before, start = _peak_bytes(), time.perf_counter()
    lowered = aot.lower_train(cfg, mesh, None)[1]
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)
  return {
    'trace_seconds': traced - start,
    'compile_seconds': compiled - traced,
    'host_bytes': _peak_bytes() - before,
  }


def _peak_bytes() -> int:
  # In KiB on Linux, in bytes on macOS.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == 'darwin' else 1024
  )


def main():
  """Reads the two configs and prints the result."""
  values = json.load(sys.stdin)
  print(json.dumps(measure(*(config.from_dict(values[key]) for key in ('config', 'warm_up')))))


if __name__ == '__main__':
  main()
