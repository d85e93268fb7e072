"""What the program that is being traced will run on."""

import jax
from jax.extend import backend


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': that of the mesh in force, else that of the default device.

  The two differ when a program is compiled on a CPU host for chips that are not there.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  # JAX 0.10.0 knows the kind only: 'cpu', 'TPU v5 lite', 'NVIDIA H100 80GB HBM3'.
  kind = device.device_kind.lower()
  return next((name for name in ('cpu', 'tpu') if kind.startswith(name)), 'gpu')


def is_3d_torus() -> bool:
  """Whether the TPU that is compiled for has a three-dimensional torus (v4, v5p, 7x)."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and 'lite' not in device.device_kind.lower()


def compute_capability() -> tuple[int, ...]:
  """Version of the default device if it is an NVIDIA GPU, (9, 0) for Hopper; else ()."""
  version = getattr(backend.get_default_device(), 'compute_capability', '')
  parts = str(version).split('.')
  return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()
