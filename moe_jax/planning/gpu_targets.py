"""NVIDIA GPUs that are not there: JAX's CUDA plugin compiles for them from a description.

The plugin alone is enough, without a GPU, a driver or NVIDIA's libraries:

  pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION  (those of jax)

What it makes is never run and nothing is tuned on the way, so that it shows what is lowered, which
buffers exist and how large they are, and says nothing of speed. cuDNN's kernels need its library.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from jax.extend import backend

from moe_jax import errors
from moe_jax.planning import chips

# What XLA asks about a device, in its own words (xla.GpuTargetConfigProto). Both are Hopper's GH100
# with 132 multiprocessors; they differ in memory, of which `chips` has the figures.
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
_KINDS = {'h100': 'NVIDIA H100 80GB HBM3', 'h200': 'NVIDIA H200'}
TARGETS = {
  name: _TARGET.format(
    kind=kind,
    bandwidth=round(chips.CHIPS[name].hbm_bandwidth),
    memory=chips.CHIPS[name].hbm_bytes,
  )
  for name, kind in _KINDS.items()
}


def installed() -> bool:
  """Whether JAX's CUDA plugin is there, of which version of CUDA is all the same."""
  return any(importlib.util.find_spec(f'jax_cuda{major}_plugin') for major in (12, 13))


def describe(name: str, count: int = 1) -> list[Any]:
  """`count` devices of a node that is not there.

  Args:
    name: key of `TARGETS`.
    count: devices, joined by NVLink.

  Raises:
    errors.InputError: there is no such target, or the plugin is missing.
  """
  errors.choice('target', name, TARGETS)
  errors.require(
    installed(),
    f'compiling for {name!r} needs the CUDA plugin of JAX; pip install --no-deps '
    "'jax-cuda13-plugin' and 'jax-cuda13-pjrt' in the version of jax",
  )
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    f'{name}x{count}', 'cuda', target_config=TARGETS[name], topology=f'1x1x{count}'
  )
  return list(topology.devices)


@contextlib.contextmanager
def as_default(device: Any) -> Iterator[None]:
  """While a program is traced and lowered: `device` is JAX's default device.

  Libraries of kernels choose between theirs by the default device, not by the mesh. There is no
  setting for it: JAX places arrays on a default device, and on one that is not there it cannot.
  """
  real = backend.get_default_device
  backend.get_default_device = lambda: device
  try:
    yield
  finally:
    backend.get_default_device = real
