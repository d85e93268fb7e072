"""The least time that a step can take: what it computes and moves, over what the devices could do.

Every resource is assumed to run at its peak and all of them at once, so the largest of the times
is a bound and not a forecast. On a torus a mesh axis runs along one or more dimensions, and
collectives that share a dimension share its links:

  ring       a dimension that closes: both directions, 2 links
  line       one that does not: all that crosses it goes over 1 link in each direction
  all-to-all on n chips of a dimension each number crosses n / 4 links of a ring on average, and the
             middle of a line sees a quarter of n operands: n / 4 times the operand in both cases

Reductions and gathers of an axis that runs along several dimensions use them all at once.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from moe_jax.planning import chips
from moe_jax.planning.hlo import collectives as collectives_lib

EXCHANGES = ('all-to-all', 'ragged-all-to-all')
Extents = Mapping[str, Mapping[str, int]]  # mesh axis -> dimension of the torus -> chips along it


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds per step of each resource."""

  seconds: dict[str, float]  # 'compute', 'hbm', 'ici' or 'nvlink', 'dcn'
  by_axes: dict[str, float]  # of each set of mesh axes, alone on its links

  @property
  def bound(self) -> float:
    return max(self.seconds.values())

  @property
  def bound_by(self) -> str:
    return max(self.seconds, key=lambda name: self.seconds[name])


def roofline(
  topology: chips.Topology,
  flops: float,
  hbm_bytes: float,
  collectives: Iterable[collectives_lib.Collective],
  mesh: Mapping[str, int],
  extents: Extents,
) -> Roofline:
  """Times of one step.

  Args:
    topology: the devices.
    flops: per device, what the busiest one computes.
    hbm_bytes: per device.
    collectives: per device; those along axes `dcn_*` use the slow network.
    mesh: sizes of the axes, in order.
    extents: see `compile_ahead.extents`; unused for GPUs.
  """
  chip = topology.chip
  if chip.kind == 'gpu':
    fast, slow, by_axes = _gpus(topology, collectives, mesh)
  else:
    fast, slow, by_axes = _tpus(topology, collectives, mesh, extents)
  seconds = {
    'compute': flops / chip.flops,
    'hbm': hbm_bytes / chip.hbm_bandwidth,
    'nvlink' if chip.kind == 'gpu' else 'ici': fast,
    'dcn': slow,
  }
  return Roofline(seconds, by_axes)


def _tpus(
  topology: chips.Topology,
  collectives: Iterable[collectives_lib.Collective],
  mesh: Mapping[str, int],
  extents: Extents,
) -> tuple[float, float, dict[str, float]]:
  """(seconds of the busiest dimension of the torus, of the network, of each set of axes alone)."""
  dims: dict[str, float] = {}
  alone: dict[str, dict[str, float]] = {}
  slow = 0.0
  for one in collectives:
    name = '+'.join(one.axes)
    if any(axis.startswith('dcn') for axis in one.axes):
      seconds = {'dcn': one.total / topology.chip.dcn_bandwidth}
      slow += seconds['dcn']
    else:
      seconds = _on_torus(topology, one, mesh, extents)
      for dim, time in seconds.items():
        dims[dim] = dims.get(dim, 0.0) + time
    here = alone.setdefault(name, {})
    for dim, time in seconds.items():
      here[dim] = here.get(dim, 0.0) + time
  by_axes = {name: max(times.values(), default=0.0) for name, times in sorted(alone.items())}
  return max(dims.values(), default=0.0), slow, by_axes


def _on_torus(
  topology: chips.Topology,
  one: collectives_lib.Collective,
  mesh: Mapping[str, int],
  extents: Extents,
) -> dict[str, float]:
  """Seconds that a collective takes of each dimension; {} if it stays on a chip."""
  along: dict[str, int] = {}
  for axis in one.axes:
    for dim, count in extents.get(axis, {}).items():
      along[dim] = along.get(dim, 1) * count
  chip = topology.chip
  whole = {dim: min(count, topology.dims[int(dim)]) for dim, count in along.items()}
  width = {dim: chip.link_bandwidth * _links(topology, dim, n) for dim, n in whole.items()}
  if one.kind in EXCHANGES:
    n = math.prod(mesh[axis] for axis in one.axes)
    operand = one.total * n / (n - 1)
    return {dim: operand * count / 4 / width[dim] for dim, count in whole.items()}
  return dict.fromkeys(whole, one.total / sum(width.values()) if width else 0.0)


def _links(topology: chips.Topology, dim: str, count: int) -> int:
  """Links that a device of a group of `count` along a dimension can use in one direction each."""
  whole = topology.dims[int(dim)]
  return 2 if count == whole and whole % topology.chip.wraps == 0 else 1


def _gpus(
  topology: chips.Topology,
  collectives: Iterable[collectives_lib.Collective],
  mesh: Mapping[str, int],
) -> tuple[float, float, dict[str, float]]:
  """(seconds of NVLink, of the network between nodes, of each set of axes alone).

  The last axes of a mesh are neighbours. A gather or a reduction between nodes is shared by the
  devices of a node, an exchange is not.
  """
  chip, fast, slow = topology.chip, 0.0, 0.0
  by_axes: dict[str, float] = {}
  for one in collectives:
    n = math.prod(mesh[axis] for axis in one.axes)
    inside = _inside_node(one.axes, mesh)
    nodes = n // inside
    near = one.total / chip.link_bandwidth if inside > 1 else 0.0
    crossing = one.total * (nodes - 1) / nodes * n / (n - 1)
    far = crossing / (1 if one.kind in EXCHANGES else inside) / chip.dcn_bandwidth
    fast, slow = fast + near, slow + far
    name = '+'.join(one.axes)
    by_axes[name] = by_axes.get(name, 0.0) + max(near, far)
  return fast, slow, dict(sorted(by_axes.items()))


def _inside_node(axes: Iterable[str], mesh: Mapping[str, int]) -> int:
  """How many devices of a group along `axes` share a node."""
  inside, neighbours = 1, 1
  for axis, size in reversed(list(mesh.items())):
    here = math.gcd(size, max(1, chips.NODE // neighbours))
    if axis in axes:
      inside *= here
    neighbours *= size
  return inside
