"""Options of the compiler that a training step and a first state ask for, by platform.

They travel with the program (`jax.jit(..., compiler_options=...)`), so that the planner's
compilation and the real one are the same. An unknown name is an error of the compiler, not a silent
loss.
"""

import jax

# Of LLVM, 0 to 3; below 1 it rounds otherwise.
FIRST_STATE_LEVEL = 1


def for_step(mesh: jax.sharding.Mesh) -> dict[str, str | bool]:
  """Options for a program on this mesh; none for CPUs and for a single device."""
  device = mesh.devices.flat[0]
  if mesh.size == 1:
    return {}
  if device.platform in ('gpu', 'cuda'):
    # Collectives run beside products. One GPU has none, and would only pay with memory for the
    # order that hides them. To pipeline them over layers needed options of their own up to JAX
    # 0.10, which 0.11 no longer knows.
    return {'xla_gpu_enable_latency_hiding_scheduler': True}
  # The compiler for v5e ('TPU v5 lite') refuses it beyond one host: not on 64 chips, yes on 8.
  can = device.platform == 'tpu' and ('v5 lite' not in device.device_kind.lower() or mesh.size <= 8)
  if can and mesh.shape['expert'] > 1:
    # By default it blocks: with this, shared experts are computed while tokens travel.
    return {'xla_tpu_enable_async_all_to_all': 'true'}
  return {}


def for_first_state(mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Options for a program that runs once, and whose compilation is therefore what it costs.

  On a CPU little optimisation: the random numbers of a first state are loops that LLVM works on for
  7 s at its usual level and 2 s at the lowest that rounds alike; they run as fast.
  """
  device = mesh.devices.flat[0]
  on_cpu = device.platform == 'cpu'
  return {'xla_backend_optimization_level': FIRST_STATE_LEVEL} if on_cpu else {}
