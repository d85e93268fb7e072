"""Options of the compiler that a training step asks for, by platform.

They travel with the step (`jax.jit(..., compiler_options=...)`), so that the planner's compilation
and the real one are the same. An unknown name is an error of the compiler, not a silent loss.
"""

import jax

from moe_jax import partitioning


def for_step(mesh: jax.sharding.Mesh) -> dict[str, str]:
  """Options for a program on this mesh; none for CPUs and GPUs."""
  options = {}
  if mesh.devices.flat[0].platform == 'tpu' and mesh.shape['expert'] > 1:
    # By default it blocks: with this, shared experts are computed while tokens travel.
    options['xla_tpu_enable_async_all_to_all'] = 'true'
  return options


def describe(mesh: jax.sharding.Mesh) -> str:
  """The options and the mesh in a few words, for logs."""
  axes = [f'{axis}={mesh.shape[axis]}' for axis in partitioning.MESH_AXES if mesh.shape[axis] > 1]
  options = [f'{name}={value}' for name, value in for_step(mesh).items()]
  return ' '.join([f'mesh={" x ".join(axes) or "1 device"}', *options])
