"""Will a run fit on a pod, and how fast could it be? Answered without the pod.

For TPUs the real step is compiled (`compile_ahead`) and its program read: memory by name, FLOPs,
bytes through HBM and over every mesh axis. For GPUs, and with `estimate`, the same is counted from
shapes (`estimate`). A roofline then says what bounds the step and which MFU is out of reach.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.inference import generate
from moe_jax.models import exchange as exchange_lib
from moe_jax.planning import chips, compile_ahead, estimate_decode, roofline
from moe_jax.planning import estimate as estimate_lib
from moe_jax.planning.hlo import collectives as collectives_lib
from moe_jax.planning.hlo import hlo_cost, hlo_memory

COMPILED, ESTIMATED = 'compiled', 'estimated from shapes'
_GIB = 2**30
DENSE = 1.25  # times the needed FLOPs: beyond, some product does work that nobody asked for
STABLE_KEYS = (
  *('fits', 'hbm_bytes', 'hbm_capacity_bytes', 'breakdown', 'flops_per_device'),
  *('collective_bytes', 'step_seconds_bound', 'bound_by', 'mfu_bound'),
  *('compile_seconds', 'host_memory_bytes'),
)
# Scope of the program -> the name under which its temporaries are reported; the first that fits.
_SCOPES = (
  ('exchange', 'exchange'),
  (
    'gate_up down swiglu combine dispatch plan moe._experts router router_stats capacity',
    'experts',
  ),
  ('head head_loss mtp_loss', 'logits and loss'),
  ('attention mla_proj mla_core', 'attention'),
  ('optimizer', 'optimizer'),
)
_OTHER, _CAST = 'other temporaries', 'weights in the compute dtype'
_SHORT = {'float32': 'f32', 'bfloat16': 'bf16'}


@dataclasses.dataclass(frozen=True)
class Request:
  """What to plan."""

  cfg: schema.Config
  topology: chips.Topology
  decode: bool = False
  rows: int = 0  # of decoding: sequences at a time; 0 = one per device
  max_vio: float | None = None  # None: balanced load, and buffers as the config has them
  estimate: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step needs, per device."""

  topology: str
  mesh: dict[str, int]
  remat: str
  micro_batch_size: int
  how: str  # COMPILED or ESTIMATED
  fits: bool
  hbm_bytes: int
  hbm_capacity_bytes: int
  breakdown: dict[str, int]  # bytes by name; they add up to hbm_bytes
  exchange_bytes: int  # buffers of tokens that travel, when most of them are alive
  flops_per_device: float  # of the model: what MFU counts
  computed_flops_per_device: float  # of the busiest device, recomputation included
  traffic_bytes: float  # through HBM
  collective_bytes: dict[str, dict[str, float]]  # by mesh axes and kind
  seconds: dict[str, float]  # the roofline's
  seconds_by_axes: dict[str, float]
  step_seconds_bound: float
  bound_by: str
  mfu_bound: float
  tokens_per_second_bound: float  # of all devices
  compile_seconds: float
  compile_cpu_seconds: float
  host_memory_bytes: int
  notes: tuple[str, ...]

  def to_json(self) -> dict[str, Any]:
    """The keys of `plan --json`: the stable ones first."""
    values = dataclasses.asdict(self)
    return {key: values[key] for key in STABLE_KEYS} | values


def plan(request: Request, *, progress: bool = False) -> Plan:
  """Plans one step.

  Args:
    request: what.
    progress: show the seconds that pass while the compiler works.

  Raises:
    errors.InputError: the sizes of config and mesh do not go together, libtpu is missing, or
      decoding is planned for a router that is not causal.
  """
  cfg, notes = prepared(request)
  mesh = estimate_lib.abstract_mesh(cfg.mesh, request.topology.num_devices)
  check_slices(request.topology, mesh)
  check_stages(mesh.shape[partitioning.STAGE])
  partitioning.check(cfg, mesh)
  rows = request.rows or partitioning.row_ways(mesh)
  way = exchange_kind(cfg, request.topology)
  if request.decode:
    generate.check_router(cfg.model)
    check_rows(rows, mesh)
    counted = estimate_decode.estimate(cfg, mesh, rows, way)
    tokens, flops = rows, estimate_decode.flops_per_token(cfg.model) * rows / mesh.size
  else:
    counted = estimate_lib.estimate(cfg, mesh, request.max_vio or 0.0, way)
    tokens = cfg.train.batch_size * cfg.model.max_seq_len
    flops = estimate_lib.work(cfg).model * tokens / mesh.size
  facts = _Facts(request, cfg, mesh, flops, tokens, notes)
  if request.estimate or request.topology.chip.kind == 'gpu':
    return facts.estimated(counted)
  values = parse.to_dict(cfg)
  context = cfg.model.max_seq_len if request.decode else 0
  job = compile_ahead.Job(
    values, request.topology.name, request.decode, rows * request.decode, context
  )
  compiled = compile_ahead.run(job, cfg.data.cache_dir, progress=progress)
  return facts.compiled(compiled, counted)


def check_rows(rows: int, mesh: jax.sharding.AbstractMesh):
  """Refuses sequences that the devices of a mesh cannot share evenly.

  Args:
    rows: sequences that are decoded together, over all devices.
    mesh: sizes of the axes.

  Raises:
    errors.InputError: the mesh splits rows into a number of parts that does not divide them.
  """
  ways = partitioning.row_ways(mesh)
  errors.require(
    rows % ways == 0,
    f'--rows={rows} must be divisible by {ways}, the parts into which the mesh splits rows: '
    f'choose {" or ".join(str(n * ways) for n in (rows // ways, rows // ways + 1) if n)}, or '
    'another --mesh',
  )


def check_stages(stages: int):
  """Refuses a mesh in stages.

  Raises:
    errors.InputError: there is more than one.
  """
  errors.require(
    stages == 1,
    f'config.mesh.stage={stages}: a step in stages is not planned as a mesh; leave stage out of '
    '--mesh, and compare with --pipeline=STAGES',
  )


def check_slices(topology: chips.Topology, mesh: jax.sharding.AbstractMesh):
  """Refuses a mesh whose fast axes would cross from one TPU slice to the next.

  Raises:
    errors.InputError: the sizes of the axes `dcn_*` do not multiply to the number of slices.
  """
  between = math.prod(mesh.shape[axis] for axis in partitioning.DCN_AXES)
  errors.require(
    topology.chip.kind == 'gpu' or between == topology.num_slices,
    f'--topology={topology.name} has {topology.num_slices} slice(s), and config.mesh.dcn_data='
    f'{mesh.shape["dcn_data"]} times dcn_fsdp={mesh.shape["dcn_fsdp"]} must multiply to it: only '
    'these axes may cross the network between slices; change them with --mesh',
  )


def prepared(request: Request) -> tuple[schema.Config, tuple[str, ...]]:
  """The config whose step is planned, and what there is to say about it."""
  cfg, notes = request.cfg, []
  if cfg.train.batch_ramp:
    notes.append('the batch is train.batch_size; the smaller steps of the ramp need less')
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_ramp=()))
  if request.max_vio is not None and cfg.model.is_moe:
    moe, factor = cfg.model.moe, 1.0 + request.max_vio
    if cfg.objective.kind in schema.OF_ANSWERS:  # a run would refuse it
      factor, kind = 0.0, cfg.objective.kind
      notes.append(f'objective.kind={kind!r} loses no assignment: buffers are of the worst case')
    bounded = dataclasses.replace(moe.exchange, buffer_factor=factor)
    moe = dataclasses.replace(moe, exchange=bounded)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
  return cfg, tuple(notes)


def exchange_kind(cfg: schema.Config, topology: chips.Topology) -> str:
  """The exchange over the expert axis that a config with `auto` gets."""
  kind, chip = cfg.model.moe.exchange.kind, topology.chip
  return kind if kind != 'auto' else exchange_lib.default(chip.kind, chip.torus == 3)


@dataclasses.dataclass(frozen=True)
class _Facts:
  """What both kinds of plan are made from."""

  request: Request
  cfg: schema.Config
  mesh: jax.sharding.AbstractMesh
  flops: float
  tokens: int  # of all devices
  notes: tuple[str, ...]

  def estimated(self, counted: estimate_lib.Estimate) -> Plan:
    """From shapes."""
    line = self._roofline(counted.flops, counted.hbm_bytes, counted.collectives, None)
    return self._plan(
      how=ESTIMATED,
      breakdown=counted.arguments | counted.temporaries,
      exchange=counted.temporaries.get('exchange', 0),
      computed=counted.flops,
      traffic=counted.hbm_bytes,
      collectives=counted.collectives,
      line=line,
    )

  def compiled(self, program: compile_ahead.Compiled, counted: estimate_lib.Estimate) -> Plan:
    """From the compiler; from shapes what it does not say of a program that does not fit."""
    if program.error:
      return self._too_large(program, counted)
    collectives = collectives_lib.collectives(
      program.text, _MeshOf(program.mesh, program.device_ids)
    )
    collectives = [self._stretched(one) for one in collectives]
    cost = hlo_cost.cost(program.text)
    # Two floors: what the step must compute, and what XLA's products, without any kernel's, do.
    computed, notes = max(counted.flops, cost.dot_flops), []
    if cost.dot_flops > DENSE * counted.flops:
      notes.append(
        f"XLA's own matrix products alone are {cost.dot_flops / self.flops:.1f} times the model's "
        'FLOPs: some product is computed densely'
      )
    line = self._roofline(computed, cost.hbm_bytes, collectives, program.extents)
    return self._plan(
      how=COMPILED,
      breakdown=breakdown(program, self.cfg.model),
      exchange=sum(buffer.bytes for buffer in hlo_memory.peak(program.text, 'exchange')),
      computed=computed,
      traffic=cost.hbm_bytes,
      collectives=collectives,
      line=line,
      program=program,
      notes=notes,
    )

  def _too_large(self, program: compile_ahead.Compiled, counted: estimate_lib.Estimate) -> Plan:
    used = used_bytes(program.error)
    known = sum(program.arguments.values())
    parts = program.arguments | {'temporaries': max(0, used - known)}
    line = self._roofline(counted.flops, counted.hbm_bytes, counted.collectives, program.extents)
    note = 'the program does not fit: all but memory is estimated from shapes'
    return self._plan(
      how=COMPILED,
      breakdown=parts,
      exchange=counted.temporaries.get('exchange', 0),
      computed=counted.flops,
      traffic=counted.hbm_bytes,
      collectives=counted.collectives,
      line=line,
      program=program,
      notes=[note],
    )

  def _stretched(self, one: collectives_lib.Collective) -> collectives_lib.Collective:
    """What a straggler gets more; buffers of a fixed size hold it already."""
    if one.kind != 'ragged-all-to-all' or not self.request.max_vio:
      return one
    return dataclasses.replace(one, bytes=one.bytes * (1 + self.request.max_vio))

  def _roofline(
    self,
    flops: float,
    traffic: float,
    collectives: Iterable[collectives_lib.Collective],
    extents: roofline.Extents | None,
  ) -> roofline.Roofline:
    topology, shape = self.request.topology, dict(self.mesh.shape)
    extents = laid_out(topology, shape) if extents is None else extents
    return roofline.roofline(topology, flops, traffic, collectives, shape, extents)

  def _plan(
    self,
    *,
    how: str,
    breakdown: Mapping[str, int],
    exchange: int,
    computed: float,
    traffic: float,
    collectives: list[collectives_lib.Collective],
    line: roofline.Roofline,
    program: compile_ahead.Compiled | None = None,
    notes: Iterable[str] = (),
  ) -> Plan:
    chip, train = self.request.topology.chip, self.cfg.train
    used = sum(breakdown.values())
    return Plan(
      topology=self.request.topology.name,
      mesh={name: size for name, size in self.mesh.shape.items() if size > 1},
      remat=self.cfg.model.remat,
      micro_batch_size=train.micro_batch_size or train.batch_size,
      how=how,
      fits=used <= chip.hbm_bytes and not (program and program.error),
      hbm_bytes=used,
      hbm_capacity_bytes=chip.hbm_bytes,
      breakdown=dict(breakdown),
      exchange_bytes=exchange,
      flops_per_device=self.flops,
      computed_flops_per_device=computed,
      traffic_bytes=traffic,
      collective_bytes=collectives_lib.bytes_by_axes(collectives),
      seconds=line.seconds,
      seconds_by_axes=line.by_axes,
      step_seconds_bound=line.bound,
      bound_by=line.bound_by,
      mfu_bound=self.flops / chip.flops / line.bound,
      tokens_per_second_bound=self.tokens / line.bound,
      compile_seconds=program.lower_seconds + program.compile_seconds if program else 0.0,
      compile_cpu_seconds=program.cpu_seconds if program else 0.0,
      host_memory_bytes=program.host_memory_bytes if program else 0,
      notes=(*self.notes, *notes),
    )


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int


class _MeshOf:
  """The mesh that a program was compiled for, of which only names, sizes and ids are left."""

  def __init__(self, shape: dict[str, int], device_ids: list[int]):
    self.shape = shape
    self.devices = np.array([_Device(number) for number in device_ids], object)


def laid_out(topology: chips.Topology, mesh: Mapping[str, int]) -> roofline.Extents:
  """Mesh axes on the torus, the last axes on the last dimensions, where the compiler has no say."""
  left = list(topology.dims)
  dims_of: dict[str, dict[str, int]] = {}
  for axis, size in reversed(list(mesh.items())):
    if axis in partitioning.DCN_AXES:
      continue
    for dim in reversed(range(len(left))):
      part = math.gcd(size, left[dim])
      if part > 1:
        dims_of.setdefault(axis, {})[str(dim)] = part
        left[dim] //= part
        size //= part
  return dims_of


def used_bytes(message: str) -> int:
  """What a program would need, from the compiler's message that it is too large."""
  units = {'K': 2**10, 'M': 2**20, 'G': _GIB, 'T': 2**40}
  match = re.search(r'Used ([\d.]+)([KMGT]) of', message)
  match = match or re.search(r'total memory required[^(]*\(([\d.]+)([KMGT])\)', message)
  return int(float(match[1]) * units[match[2]]) if match else 0


def breakdown(program: compile_ahead.Compiled, model: schema.ModelConfig) -> dict[str, int]:
  """Bytes by name: arguments exactly, the program, and temporaries that add up to the peak.

  What is alive at the peak comes from a replay of the schedule, which places buffers a little
  differently than the compiler: the parts are scaled to the compiler's total.
  """
  memory = program.memory
  total = memory['peak'] or memory['argument'] + memory['temp']
  known = sum(program.arguments.values())
  padding = memory['argument'] - known
  parts = collections.Counter()
  for buffer in hlo_memory.peak(program.text):
    parts[_name(buffer, program.parameter_sizes, model)] += buffer.bytes
  left, replayed = max(0, total - memory['argument']), sum(parts.values())
  named = {name: round(size * left / replayed) for name, size in parts.most_common() if replayed}
  named[_OTHER] = named.get(_OTHER, 0) + left - sum(named.values())
  found = program.arguments | {'padding of arguments': padding} | named
  return found | {'program': memory['generated_code']}


def _name(buffer: hlo_memory.Buffer, sizes: list[int], model: schema.ModelConfig) -> str:
  """What a temporary is for, by its size, its place in a stack of layers, and its scopes."""
  scopes, dims = hlo_memory.scopes(buffer.op_name), buffer.shape.dims
  if 'exchange' in scopes:
    return 'exchange'
  if buffer.shape.size in sizes:
    kept = buffer.shape.dtype in (_SHORT[model.param_dtype], 'f32')
    return 'gradients' if kept else _CAST
  if buffer.name.startswith(('all-gather', 'all_gather')):
    return _CAST
  stacks = (model.num_moe_layers, model.num_layers - model.num_moe_layers)
  if len(dims) > 2 and dims[0] in stacks and dims[0] > 1:
    return 'activations kept for the backward pass'
  for words, name in _SCOPES:
    if scopes & set(words.split()):
      return name
  return _OTHER
