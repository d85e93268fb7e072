"""Devices and shardings. Layers name logical axes only; this module maps them onto a mesh.

The exchanges alone know a mesh axis, `expert`, over which they move tokens.

One table says which mesh axes split which logical axis, for parameters, optimizer state and
activations alike. Every mesh has all of `MESH_AXES`, most of them of size 1; the sizes come from
`config.mesh`.

Rows of a batch are split over every axis that does not split a row or a layer (`ROW_AXES`): outside
of the MoE layers the expert axis is one more axis of data parallelism, and outside of a pipeline
so is the axis of its stages. Inside of it (`per_stage`) no rule names that axis.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import linen as nn
from flax.linen import spmd
from jax.experimental import mesh_utils

from moe_jax import errors, trees
from moe_jax.config import mesh_config, schema, stage_rules

MESH_AXES = mesh_config.AXES
DCN_AXES = ('dcn_data', 'dcn_fsdp')  # between slices: the slow network
STAGE = 'stage'
STAGE_ROW_AXES = (*DCN_AXES, 'data', 'fsdp', 'expert')  # inside of a pipeline
ROW_AXES = (STAGE, *STAGE_ROW_AXES)
FSDP_AXES = ('dcn_fsdp', 'fsdp')
COPIES = ('dcn_data', 'data')  # which split no weight

# Logical axis -> mesh axes. Activations carry the prefix act_, so that sharding parameters (FSDP)
# never decides the layout of activations. () = replicated.
LOGICAL_AXIS_RULES = (
  ('act_batch', ROW_AXES),
  ('act_len', ('sequence',)),
  ('act_parts', (STAGE,)),
  ('act_part_batch', STAGE_ROW_AXES),
  ('act_embed', ()),
  ('act_heads', ('tensor',)),
  ('act_mlp', ('tensor',)),
  ('layers', ()),
  ('stage_layers', (STAGE,)),
  ('vocab', ('tensor',)),
  ('embed', FSDP_AXES),
  ('heads', ('tensor',)),
  ('kv_heads', ('tensor',)),
  ('head_dim', ()),
  ('q_lora', FSDP_AXES),
  ('kv_lora', FSDP_AXES),
  ('norm', ()),
  ('gate_up', ()),
  ('mtp_pair', ()),
  ('mlp', ('tensor',)),
  ('router_embed', FSDP_AXES),
  ('router_expert', ()),
  ('expert', ('expert',)),
  ('expert_embed', FSDP_AXES),
  ('expert_mlp', ('tensor',)),
)
_MESH_AXES = dict(LOGICAL_AXIS_RULES)
BATCH_SPEC = jax.P(ROW_AXES, 'sequence')  # of [B, L]

_T = TypeVar('_T')
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh  # the latter has sizes, and no devices
Names = tuple[str | None, ...]  # one logical axis per dimension, None = replicated


def make_mesh(
  cfg: mesh_config.MeshConfig,
  # pyright: ignore is needed because JAX makes this alias at run time.
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> jax.sharding.Mesh:
  """A mesh over `devices` (default: all), with every -1 replaced by the devices that are left.

  The last axes are the closest neighbours. The axes `dcn_*` are laid between slices where the
  devices have any.

  Raises:
    errors.InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_config.resolve(cfg, len(devices))
  shape = tuple(sizes.values())
  between = math.prod(sizes[name] for name in DCN_AXES)
  # On other platforms a slice may be a node, whose network is the user's affair.
  is_tpu = devices[0].platform == 'tpu'
  num_slices = len({getattr(device, 'slice_index', 0) for device in devices}) if is_tpu else 1
  errors.require(
    num_slices in (1, between),
    f'config.mesh.dcn_data={sizes["dcn_data"]} times dcn_fsdp={sizes["dcn_fsdp"]} must be the '
    f'number of slices, {num_slices}: only these axes may cross the network between them',
  )
  # The default axis type differs between JAX releases, and constraints need Auto.
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  if not is_tpu:
    # As listed, process by process: so a process's devices are neighbours.
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=auto)
  if num_slices > 1:
    inner = tuple(1 if name in DCN_AXES else size for name, size in sizes.items())
    outer = tuple(size if name in DCN_AXES else 1 for name, size in sizes.items())
    grid = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices=devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=auto)


def row_ways(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return _ways(mesh, ROW_AXES)


def _ways(mesh: Mesh, axes: Sequence[str]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def check(cfg: schema.Config, mesh: Mesh):
  """Refuses what the mesh cannot split evenly: batches, and the sizes of the model.

  Raises:
    errors.InputError: names the size, the axes and the ways out.
  """
  train, model = cfg.train, cfg.model
  batches = {'train.batch_size': train.batch_size, 'train.micro_batch_size': train.micro_batch_size}
  batches |= {f'train.batch_ramp[{i}]': size for i, (_, size) in enumerate(train.batch_ramp)}
  for name, size in batches.items():
    _divides(mesh, name, size, ROW_AXES)
  stage_rules.check(cfg, mesh.shape, STAGE_ROW_AXES)
  _divides(mesh, 'model.max_seq_len', model.max_seq_len, ('sequence',))
  _divides(mesh, 'model.embed_dim', model.embed_dim, FSDP_AXES)
  _divides(mesh, 'model.vocab_size', model.vocab_size, ('tensor',))
  _divides(mesh, 'model.num_heads', model.num_heads, ('tensor',))
  if model.attention.kind == 'mla':
    for name in ('q_lora_rank', 'kv_lora_rank'):
      _divides(mesh, f'model.attention.mla.{name}', getattr(model.attention.mla, name), FSDP_AXES)
  else:
    _divides(mesh, 'model.attention.num_kv_heads', model.attention.num_kv_heads, ('tensor',))
  if model.num_dense_layers or not model.is_moe:
    _divides(mesh, 'model.mlp_dim', model.mlp_dim, ('tensor',))
  if model.is_moe:
    _divides(mesh, 'model.moe.num_experts', model.moe.num_experts, ('expert',))
    _divides(mesh, 'model.moe.moe_mlp_dim', model.moe.moe_mlp_dim, ('tensor',))
  else:
    errors.require(
      mesh.shape['expert'] == 1,
      f'config.mesh.expert={mesh.shape["expert"]} splits experts, of which '
      'config.model.moe.num_experts=0 leaves none; use config.mesh.data or fsdp instead',
    )


def _divides(mesh: Mesh, name: str, size: int, axes: Sequence[str]):
  ways = _ways(mesh, axes)
  if size % ways == 0:
    return
  used = [axis for axis in axes if mesh.shape[axis] > 1]
  by = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in used)
  nearest = [n for n in (size - size % ways, size + ways - size % ways) if n]
  raise errors.InputError(
    f'config.{name}={size} must be divisible by {ways}, the devices along the mesh axes that split '
    f'it ({by}); choose {" or ".join(map(str, nearest))}, or change '
    f'{" or ".join(f"config.mesh.{axis}" for axis in used)}'
  )


def rules(mesh: Mesh) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
  """The table for one mesh: axes of size 1 left out, None where nothing is left.

  Inside of `per_stage` so is the axis of the stages.
  """
  shape = _free(mesh)
  table = []
  for name, axes in LOGICAL_AXIS_RULES:
    axes = tuple(axis for axis in axes if shape.get(axis, 1) > 1)
    table.append((name, (axes[0] if len(axes) == 1 else axes) or None))
  return tuple(table)


def _free(mesh: Mesh) -> dict[str, int]:
  """The axes and their sizes, without those over which a function is mapped already."""
  mapped = getattr(mesh, 'manual_axes', ())
  return {axis: size for axis, size in mesh.shape.items() if axis not in mapped}


def spec(*names: str | None) -> jax.P:
  """The layout of one array by the table, on the mesh in force: one logical axis per dimension."""
  table = dict(rules(jax.sharding.get_abstract_mesh()))
  return jax.P(*(None if name is None else table[name] for name in names))


def axis_size(axis: str) -> int:
  """Size of a mesh axis of the mesh in force; 1 without a mesh."""
  return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def shardings(boxed: trees.Tree, mesh: Mesh) -> trees.Tree:
  """NamedSharding of every leaf of an (abstract) tree whose parameters carry axis names."""
  specs = nn.get_partition_spec(boxed)
  # Flax states a mesh of devices, but builds NamedShardings only, which take either.
  found = spmd.logical_to_mesh_sharding(specs, cast(jax.sharding.Mesh, mesh), rules(mesh))
  return jax.tree.map(_evened, found, unbox(boxed))


def _evened(sharding: jax.NamedSharding, leaf: Any) -> jax.NamedSharding:
  """The sharding of a weight whose layers the stages of a pipeline cannot share evenly.

  They share another axis, in front of the mesh axes that split it already; where that does not
  divide, every stage keeps all.
  """
  spec, mesh = list(sharding.spec), sharding.mesh
  if not spec or spec[0] != STAGE:
    return sharding
  axis = stage_rules.shared_axis(leaf.shape, mesh.shape[STAGE])
  if axis == 0:
    return sharding
  spec[0] = None
  if axis != stage_rules.WHOLE:
    old = spec[axis] or ()
    new = (STAGE, *((old,) if isinstance(old, str) else old))
    spec[axis] = new if leaf.shape[axis] % _ways(mesh, new) == 0 else spec[axis]
  return jax.NamedSharding(mesh, jax.P(*spec))


def split_further(sharding: jax.NamedSharding, shape: Sequence[int]) -> jax.NamedSharding:
  """ZeRO-1: splits an array over the row axes that its sharding leaves out, where they divide.

  Each axis goes to the dimension that is longest on a device; one that divides none is left out.
  """
  mesh, spec = sharding.mesh, list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
  axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]
  used = {axis for entry in axes for axis in entry}
  for axis in ROW_AXES:
    size = mesh.shape[axis]
    lengths = [n // _ways(mesh, entry) for n, entry in zip(shape, axes)]
    fits = [i for i, length in enumerate(lengths) if length % size == 0]
    if size > 1 and axis not in used and fits:
      axes[max(fits, key=lambda i: lengths[i])] += (axis,)
  return jax.NamedSharding(mesh, jax.P(*(entry or None for entry in axes)))


def unbox(boxed: trees.Tree) -> trees.Tree:
  """The tree without its axis names. Unlike `nn.unbox` it also works on shapes under a mesh."""

  def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)

  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def row_shards(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
  """Which of the `row_ways(mesh)` equal parts of a batch's rows this process's devices hold.

  Sorted. Where the mesh follows the wiring of a TPU slice, a host's parts need not be neighbours;
  and processes that share the axes `sequence` or `tensor` hold the same ones.
  """
  ways = row_ways(mesh)
  sharding = jax.NamedSharding(mesh, jax.P(ROW_AXES))
  indices = sharding.addressable_devices_indices_map((ways,)).values()
  return tuple(sorted({index[0].indices(ways)[0] for index in indices if index is not None}))


def put_batch(batch: trees.HostBatch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Puts this process's rows of a global batch onto the mesh.

  Args:
    batch: arrays [B * len(shards) / ways, L], the rows of `row_shards(mesh)`, part after part.
    mesh: the devices of all processes.

  Returns:
    Arrays [B, L].
  """
  sharding, shards, ways = jax.NamedSharding(mesh, BATCH_SPEC), row_shards(mesh), row_ways(mesh)
  place = {shard: i for i, shard in enumerate(shards)}

  def put(x: np.ndarray) -> jax.Array:
    size = len(x) // len(shards)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # every process has rows of every batch
      begin = place[index[0].indices(size * ways)[0] // size] * size
      return x[(slice(begin, begin + size), *index[1:])]

    return jax.make_array_from_callback((size * ways, *x.shape[1:]), sharding, part)

  return {key: put(x) for key, x in batch.items()}


def put_global_batch(batch: trees.HostBatch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Puts arrays [B, L] and [B] that every process holds whole onto the mesh."""

  def put(x: np.ndarray) -> jax.Array:
    sharding = jax.NamedSharding(mesh, jax.P(*BATCH_SPEC[: x.ndim]))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return {k: put(v) for k, v in batch.items()}


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Puts the mesh and the rules in force while a function is traced."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh)):
    yield


def without_mesh() -> contextlib.AbstractContextManager[Any]:
  """A context without a mesh, also inside of `activate`."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def per_shard(fn: Callable[..., _T], in_axes: tuple[Any, ...], out_axes: Any) -> Callable[..., _T]:
  """Runs `fn` on every device's own part of its arguments, under the mesh in force at tracing time.

  Sorting tokens by expert and grouped kernels must not be left to the partitioner: it would gather
  all rows on every device. Gradients of an argument are summed over the mesh axes that do not split
  it.

  Args:
    fn: called with the parts; may use collectives over mesh axes.
    in_axes: for each argument the logical axes of (all arrays in) it, None = whole everywhere.
    out_axes: the same for the result, or a tuple of such for a tuple of results.

  Returns:
    The function of whole arrays; `fn` itself without a mesh, or with a single device.
  """
  axes = _free(jax.sharding.get_abstract_mesh())
  if math.prod(axes.values()) == 1:
    return fn
  # check_vma would need every custom VJP below to cast its weights to device-varying by hand.
  return jax.shard_map(
    fn,
    in_specs=tuple(map(_specs, in_axes)),
    out_specs=_specs(out_axes),
    axis_names=set(axes),
    check_vma=False,
  )


def per_stage(fn: Callable[..., _T], in_specs: Any, out_specs: Any) -> Callable[..., _T]:
  """Runs `fn` in every stage of a pipeline, and there on every copy of its weights.

  How the other devices of a stage share the work stays with the partitioner, and with `per_shard`.

  Args:
    fn: called with the parts of its arguments; may use collectives over `STAGE` and `COPIES`.
    in_specs: for each argument the layout over these axes of (all arrays in) it, or a tree of such.
      Gradients are summed over those that do not split an argument, once, after all of `fn`.
    out_specs: the same for the result.

  Returns:
    The function of whole arrays, under the mesh in force at tracing time.
  """

  def in_stage(*args: Any) -> _T:
    with nn.logical_axis_rules(rules(jax.sharding.get_abstract_mesh())):
      return fn(*args)

  return jax.shard_map(
    in_stage,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={STAGE, *COPIES},
    check_vma=False,
  )


def _specs(axes: Any) -> Any:
  if axes is None:
    return jax.P()
  if all(name is None or isinstance(name, str) for name in axes):
    return spec(*axes)
  return tuple(map(_specs, axes))


def split_axes(name: str) -> tuple[str, ...]:
  """The mesh axes in force, of more than one device, that split a logical axis."""
  return tuple(axis for axis in _MESH_AXES[name] if axis_size(axis) > 1)


def sum_over(name: str, part: jax.Array) -> jax.Array:
  """Inside `per_shard`: the sum of all devices' parts of a contraction over a logical axis."""
  axes = split_axes(name)
  return jax.lax.psum(part, axes) if axes else part


def first_index(name: str, size: int) -> jax.Array | int:
  """Inside `per_shard`: where this device's part, of `size`, of a logical axis begins."""
  axes = split_axes(name)
  return jax.lax.axis_index(axes) * size if axes else 0


def gather_over(name: str, part: jax.Array, axis: int) -> jax.Array:
  """Inside `per_shard`: an array made whole along `axis`, whose logical axis is `name`.

  Its gradient is summed and split again by one reduce-scatter.
  """
  axes = split_axes(name)
  return jax.lax.all_gather(part, axes, axis=axis, tiled=True) if axes else part


def gather_shards(part: jax.Array, axis: int) -> jax.Array:
  """Inside `per_shard`: a parameter made whole along an axis that FSDP splits."""
  return gather_over('embed', part, axis)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """States the layout of an activation by its logical axes; nothing without a mesh."""
  return spmd.with_logical_constraint(x, names)
