"""Devices and shardings. The model names logical axes only; this module maps them onto a mesh.

One table says which mesh axis splits which logical axis. Today the mesh has the single axis `data`,
which splits batches; expert, FSDP, tensor and sequence axes enter through `MeshConfig`, `MESH_AXES`
and this table, and nowhere else.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from moe_jax import config, errors

MESH_AXES = ('data',)

# Logical axis -> mesh axis. Activations carry the prefix act_, so that sharding parameters (FSDP)
# never decides the layout of activations. None = replicated.
LOGICAL_AXIS_RULES = (
  ('act_batch', 'data'),
  ('act_len', None),
  ('act_embed', None),
  ('layers', None),
  ('vocab', None),
  ('embed', None),
  ('heads', None),
  ('kv_heads', None),
  ('head_dim', None),
  ('q_lora', None),
  ('kv_lora', None),
  ('gate_up', None),
  ('mtp_pair', None),
  ('mlp', None),
  ('expert', None),
  ('expert_mlp', None),
)
BATCH_SPEC = jax.P('data')


def make_mesh(
  cfg: config.MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh over `devices` (default: all), with every -1 replaced by the devices that are left.

  Raises:
    errors.InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  size = len(devices) if cfg.data == -1 else cfg.data
  if size != len(devices):
    raise errors.InputError(
      f'config.mesh.data={cfg.data} must equal the number of devices ({len(devices)}); '
      'set it to that number, or to -1 to take them all'
    )
  # The default axis type differs between JAX releases, and constraints need Auto.
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh((size,), MESH_AXES, axis_types=auto, devices=devices)


def check_batch(cfg: config.TrainConfig, mesh: jax.sharding.Mesh):
  """Refuses batch sizes that the mesh cannot split evenly.

  Raises:
    errors.InputError: names the size, the axis and the way out.
  """
  ways = mesh.shape['data']
  named = {'train.batch_size': cfg.batch_size, 'train.micro_batch_size': cfg.micro_batch_size}
  named |= {f'train.batch_ramp[{i}]': size for i, (_, size) in enumerate(cfg.batch_ramp)}
  for name, size in named.items():
    if size % ways:
      raise errors.InputError(
        f"config.{name}={size} must be divisible by the 'data' mesh axis ({ways}); "
        f'choose {size + ways - size % ways}, or change config.mesh.data'
      )


def shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedSharding of every leaf of an (abstract) tree whose parameters carry axis names."""
  specs = nn.get_partition_spec(boxed)
  return nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)


def unbox(boxed: Any) -> Any:
  """The tree without its axis names. Unlike `nn.unbox` it also works on shapes under a mesh."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Puts this process's rows of a global batch onto the mesh, split over the data axis."""
  sharding = jax.NamedSharding(mesh, BATCH_SPEC)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_global_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Puts a batch that every process holds whole onto the mesh, split over the data axis."""
  sharding = jax.NamedSharding(mesh, BATCH_SPEC)
  put = lambda v: jax.make_array_from_callback(v.shape, sharding, lambda index: v[index])
  return {k: put(v) for k, v in batch.items()}


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Puts the mesh and the rules in force while a function is traced."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
    yield


def over_batch_shards(fn: Callable[..., Any], num_batch_args: int) -> Callable[..., Any]:
  """Runs `fn` on every device's own rows, under the mesh in force at tracing time.

  Sorting tokens by expert and grouped kernels must not be left to the partitioner: it would gather
  all rows on every device. The first `num_batch_args` arguments and the results are split along
  their first dimension; the others are whole on every device, and their gradients are summed over
  devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape['data'] == 1:
    return fn

  def mapped(*args: jax.Array) -> Any:
    specs = tuple(BATCH_SPEC if i < num_batch_args else jax.P() for i in range(len(args)))
    # check_vma would need every custom VJP below to cast its weights to device-varying by hand.
    return jax.shard_map(fn, in_specs=specs, out_specs=BATCH_SPEC, check_vma=False)(*args)

  return mapped
