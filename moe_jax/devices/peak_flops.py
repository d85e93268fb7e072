"""FLOP/s that a plain square matmul reaches on the devices at hand."""

import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moe_jax import atomic_files, errors

_Path = str | os.PathLike[str]


def matmul_peak(dtype: Any, cache_dir: _Path) -> float:
  """FLOP/s that square matmuls of `dtype` reach here, over all devices; measured once, then cached.

  Virtual CPU devices share the cores of their host, so the CPU counts once. The cache,
  `cache_dir/matmul_peak.json`, is keyed by device kind, dtype, jax version and CPU count.
  """
  device = jax.local_devices()[0]
  count = 1 if device.platform == 'cpu' else jax.device_count()
  dtype = jnp.dtype(dtype)
  key = f'{device.device_kind}|{dtype.name}|jax {jax.__version__}|{os.cpu_count()} cpus'
  path = pathlib.Path(cache_dir) / 'matmul_peak.json'
  cache = _read_peaks(path)
  if key not in cache:
    cache[key] = measure_peak(dtype, device.platform)
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      atomic_files.write_text(path, json.dumps(cache, indent=2) + '\n')
    except (OSError, errors.InputError) as e:  # the latter of a full disk
      logging.warning('Matmul peak is not cached, it will be measured again next time: %s', e)
  return cache[key] * count


def measure_peak(dtype: jnp.dtype, platform: str) -> float:
  """FLOP/s of one device, the best over a few sizes; each is tried for a fraction of a second."""
  sizes, seconds, launches = (4096, 8192), 0.5, 8
  if platform == 'cpu':
    sizes, seconds, launches = (512, 1024, 1536), 0.25, 1
  multiply = jax.jit(jnp.matmul)
  rng, best = np.random.default_rng(0), 0.0
  for size in sizes:
    # Drawn by NumPy: to compile JAX's generator takes longer than all the products.
    a = jnp.asarray(rng.standard_normal((size, size), np.float32), dtype)
    jax.block_until_ready(multiply(a, a))  # compiles
    stop = time.perf_counter() + seconds
    while True:
      start = time.perf_counter()
      # Several launches in flight hide the cost of dispatch on an accelerator.
      jax.block_until_ready([multiply(a, a) for _ in range(launches)])
      now = time.perf_counter()
      best = max(best, launches * 2 * size**3 / (now - start))
      if now > stop:
        break
  return best


def _read_peaks(path: pathlib.Path) -> dict[str, float]:
  try:
    cache = json.loads(path.read_text(encoding='utf-8'))
    if not all(isinstance(v, float) and 0 < v < math.inf for v in cache.values()):
      raise ValueError('a value is not a positive number')
    return cache
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, AttributeError) as e:
    logging.warning('Cached matmul peaks in %s are unusable (%s); measuring again', path, e)
    return {}
