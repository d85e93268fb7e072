"""Traces and compiles one train step in a process of its own; prints what that took as JSON.

python -m experiments.bench.compile_case < config.json
"""

import json
import sys
import time

import jax

from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.planning import compile_ahead, host_memory


def measure(cfg: schema.Config, warm_up: schema.Config) -> dict[str, float]:
  """Seconds of tracing and of compiling, and by how much they raised the process's peak memory.

  A small model is traced first, so that what Python imports on the way is left out; what JAX then
  remembers of it is cleared. The cache of compiled programs is off.
  """
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    mesh = partitioning.make_mesh(cfg.mesh)
    compile_ahead.lower_train(warm_up, mesh, None)
    jax.clear_caches()
    before, start = host_memory.peak(), time.perf_counter()
    lowered = compile_ahead.lower_train(cfg, mesh, None)[1]
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)
  return {
    'trace_seconds': traced - start,
    'compile_seconds': compiled - traced,
    'host_bytes': host_memory.peak() - before,
  }


def main():
  """Reads the two configs and prints the result."""
  values = json.load(sys.stdin)
  print(json.dumps(measure(*(parse.from_dict(values[key]) for key in ('config', 'warm_up')))))


if __name__ == '__main__':
  main()
