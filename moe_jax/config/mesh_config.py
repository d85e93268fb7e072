"""What every field of `mesh` means and the rules between them that need no devices.

The rows of a batch are split over all axes but `sequence` and `tensor`; the other axes say what is
split besides: `stage` the layers, `fsdp` the parameters, `expert` the experts. How sizes must
divide each other is checked against the devices, by `partitioning.check`.
"""

import dataclasses
import math

from moe_jax import errors


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the device mesh's axes; -1, for one of them, takes the devices that are left."""

  # Stages of a pipeline, each with its part of the MoE layers (of all layers of a dense model).
  # Outside of these layers its devices share the rows.
  stage: int
  dcn_data: int  # slices (or nodes) with a slow network between them, each with all parameters
  dcn_fsdp: int  # slices that share the parameters
  data: int  # copies of the model
  fsdp: int  # parameters, gradients and optimizer state split along the embedding
  expert: int  # experts split; tokens travel to them, see model.moe.exchange
  sequence: int  # the tokens of a row split (context parallelism)
  tensor: int  # heads, FFN widths and vocabulary split
  # Parts of the rows of a forward pass that follow each other through the stages, a multiple of
  # their number; 0 = four times as many as stages, or what the rows allow. Of no effect without.
  stage_micro_batches: int
  zero1: bool  # optimizer state split over all axes that split rows, also where weights are not


_NO_AXES = ('stage_micro_batches', 'zero1')
AXES = tuple(f.name for f in dataclasses.fields(MeshConfig) if f.name not in _NO_AXES)


def sizes(mesh: MeshConfig) -> dict[str, int]:
  """The axes' sizes by name, in order, as written."""
  return {name: getattr(mesh, name) for name in AXES}


def validate(mesh: MeshConfig):
  """Checks the sizes.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  for name, size in sizes(mesh).items():
    errors.require(
      size == -1 or size >= 1,
      f'config.mesh.{name}={size} must be a number of devices, or -1 for all that are left',
    )
  errors.at_least(mesh, 'mesh', 0, 'stage_micro_batches')
  free = [name for name, size in sizes(mesh).items() if size == -1]
  errors.require(
    len(free) <= 1,
    f'config.mesh.{" and config.mesh.".join(free)} are both -1, but only one axis can take the '
    'devices that are left; give the others a size',
  )


def resolve(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
  """The axes' sizes with -1 replaced.

  Raises:
    errors.InputError: the sizes do not multiply to the number of devices.
  """
  resolved = sizes(mesh)
  known = math.prod(size for size in resolved.values() if size != -1)
  free = next((name for name, size in resolved.items() if size == -1), None)
  written = ', '.join(f'config.mesh.{name}={size}' for name, size in resolved.items() if size != 1)
  if free is not None:
    errors.require(
      num_devices % known == 0,
      f'{written}: the sizes of the other axes multiply to {known}, which must divide the number '
      f'of devices ({num_devices}), so that {free}=-1 can take the rest; change one of them',
    )
    return resolved | {free: num_devices // known}
  errors.require(
    known == num_devices,
    f'{written or "config.mesh.data=1"}: the sizes multiply to {known}, which must equal the '
    f'number of devices ({num_devices}); change them, or set one to -1 to take what is left',
  )
  return resolved
