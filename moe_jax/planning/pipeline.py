"""Would pipeline parallelism be faster? An estimate of what it could reach with each schedule.

`gpipe` is built, as the mesh axis `stage` (`moe_jax.models.pipeline_stages`); the others are not.

The layers are cut into p stages of neighbouring layers, each on its own D / p of the D devices, and
a batch passes through them in m micro-batches. Weights stay where they are, so that less of them is
gathered; stages wait for each other, keep the activations of several micro-batches, and send these
to the next stage. The seconds that a device waits per step ("bubble"), with F, B and W of a stage
and micro-batch for the forward pass, the whole backward pass, and its part that makes the gradients
of weights:

  gpipe        (p - 1) (F + B) per pass       Huang et al., arXiv 1811.06965. A pass has all of its
                                              micro-batches in flight; a batch may be several
                                              passes, whose gradients add up
  1f1b         (p - 1) (F + B)                PipeDream-Flush; Narayanan et al., arXiv 2104.04473:
                                              the share (p - 1) / (m + p - 1) of the time
  zb1p         (p - 1) (F + B - 2 W)          Qi et al., arXiv 2401.10241
  dualpipe     (p / 2 - 1) (FB + B - 3 W)     DeepSeek-V3, arXiv 2412.19437, Table 2, which has all
                                              three; FB is F + B where arithmetic is the bound. Two
                                              copies of the weights.
  zero_bubble  0                              Qi et al., ZB-H2: nobody waits, but activations of
                                              2 p - 1 micro-batches are kept

The rest is `estimate`'s count of a middle stage, and on purpose too good, so that a loss is certain
and a gain is not: stages are balanced to the mean, or to whole layers where these are more;
vocabulary and multi-token prediction need no memory; gradients are reduced once per step over
copies of a stage; a stage that is a part of a torus has its own rings; waiting is for arithmetic
alone. Every schedule takes as many micro-batches as stages at least, DualPipe twice as many, and
GPipe a multiple.

What is built is counted as it is: a stage that waits repeats its work, with all that travels;
gradients are reduced over copies of a stage once per pass, and over the devices of its experts and
of a row's pieces in every tick; and where stages have unequal numbers of layers, weights and
gradients are swapped once per pass, with room for a second copy of the weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from moe_jax import errors
from moe_jax.config import schema, stage_rules
from moe_jax.devices import partitioning
from moe_jax.planning import chips, planner, planner_search, roofline
from moe_jax.planning import estimate as estimate_lib

_COPIED = ('parameters', 'gradients', 'weights in the compute dtype')
_KEPT = 'activations kept for the backward pass'
_NO_VOCABULARY = 64  # of a stage without embedding and head; every tensor axis divides it


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Seconds of a stage and micro-batch."""

  forward: float  # F
  backward: float  # B, what it recomputes and W included
  weights: float  # W

  @property
  def both(self) -> float:
    """F + B."""
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Schedule:
  """In which order the chunks of a stage run; the source is named above."""

  bubble: Callable[[int, Chunk], float]  # (p, chunk) -> seconds per pass
  # (p, micro-batches of a pass) -> those whose activations a stage keeps, at most.
  in_flight: Callable[[int, int], int]
  least: int = 1  # micro-batches per stage that it takes
  copies: int = 1  # of the weights
  built: bool = False  # otherwise a batch is one pass, and what is built has no part in it


SCHEDULES = {
  # While a stage waits it computes on something, and keeps that too.
  'gpipe': Schedule(lambda p, c: (p - 1) * c.both, lambda p, m: m + p - 1, built=True),
  '1f1b': Schedule(lambda p, c: (p - 1) * c.both, lambda p, m: min(p, m)),
  'zb1p': Schedule(lambda p, c: (p - 1) * (c.both - 2 * c.weights), lambda p, m: min(p, m)),
  'dualpipe': Schedule(
    lambda p, c: (p / 2 - 1) * (c.both + c.backward - 3 * c.weights),
    lambda p, m: min(p + 1, m),
    least=2,
    copies=2,
  ),
  'zero_bubble': Schedule(lambda p, c: 0.0, lambda p, m: min(2 * p - 1, m)),
}


@dataclasses.dataclass(frozen=True)
class Pipelined:
  """What one step could need, per device."""

  schedule: str
  stages: int
  mesh: dict[str, int]  # of a stage
  remat: str
  micro_batch_size: int
  micro_batches: int  # of the batch
  passes: int  # that it is cut into
  hbm_bytes: int
  hbm_capacity_bytes: int
  activation_bytes: int  # kept, of all micro-batches in flight
  sent_bytes: float  # to the stages before and after
  seconds: dict[str, float]  # the roofline's, without the bubble
  bubble_seconds: float
  bubble_share: float  # of the bound
  step_seconds_bound: float
  step_seconds_one_by_one: float  # if nothing overlapped


def best(request: planner.Request, stages: int) -> list[Pipelined]:
  """The fastest that fits of each schedule, of all meshes, remat policies and micro-batches.

  Args:
    request: what the pipeline is compared with; its mesh, remat and micro-batch are what is tried.
    stages: p.

  Returns:
    In the order of SCHEDULES; a schedule with which nothing fits is left out.

  Raises:
    errors.InputError: the layers or the devices cannot be cut into so many stages.
  """
  topology = stage_topology(request.topology, stages)
  cfg, _ = planner.prepared(request)
  room = planner_search.LIKELY * topology.chip.hbm_bytes
  fastest: dict[str, Pipelined] = {}
  for candidate in planner_search.candidates(stage_config(cfg, stages), topology):
    stage = _Stage(request, cfg, candidate, topology, stages)
    for found in stage.pipelined():
      known = fastest.get(found.schedule)
      if found.hbm_bytes <= room and (known is None or _order(found) < _order(known)):
        fastest[found.schedule] = found
  return [fastest[name] for name in SCHEDULES if name in fastest]


def _order(one: Pipelined) -> tuple[float, float]:
  return one.step_seconds_bound, one.step_seconds_one_by_one


def stage_topology(topology: chips.Topology, stages: int) -> chips.Topology:
  """The devices of a stage: some of the slices, then a part of one, its longest side halved first.

  Raises:
    errors.InputError: the devices cannot be shared by so many stages.
  """
  between = math.gcd(stages, topology.num_slices)
  dims, left = list(topology.dims), stages // between
  while left > 1 and left % 2 == 0 and max(dims) % 2 == 0:
    dims[dims.index(max(dims))] //= 2
    left //= 2
  errors.require(
    stages > 1 and left == 1,
    f'--pipeline={stages} must be a power of two above 1 by which --topology={topology.name} can '
    'be cut; choose 2, 4, 8 or 16',
  )
  return dataclasses.replace(topology, dims=tuple(dims), num_slices=topology.num_slices // between)


def stage_config(cfg: schema.Config, stages: int) -> schema.Config:
  """A middle stage: as many layers as one has at most, of the kind that most layers are.

  Raises:
    errors.InputError: there are fewer layers than stages.
  """
  model = cfg.model
  layers = model.num_layers + model.num_mtp_layers
  errors.require(
    stages <= layers,
    f'--pipeline={stages} must be at most the number of layers, {layers}; choose fewer stages',
  )
  model = dataclasses.replace(
    model,
    num_layers=math.ceil(layers / stages),
    num_dense_layers=0,
    num_mtp_layers=0,
    vocab_size=_NO_VOCABULARY,
  )
  # A copy of a stage keeps no more of the optimizer's state than it must.
  mesh = dataclasses.replace(cfg.mesh, zero1=True)
  return dataclasses.replace(cfg, model=model, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class _Stage:
  """A candidate for the middle stage."""

  request: planner.Request
  whole: schema.Config  # of the model
  cfg: schema.Config  # of the stage
  topology: chips.Topology  # of the stage
  stages: int

  @property
  def micros(self) -> int:
    return self.cfg.train.batch_size // self.cfg.train.micro_batch_size

  def pipelined(self) -> Iterator[Pipelined]:
    """Its step with each schedule; nothing where sizes do not divide or micro-batches are few."""
    ways = [(n, g) for n, rule in SCHEDULES.items() for g in self._passes(rule)]
    mesh = estimate_lib.abstract_mesh(self.cfg.mesh, self.topology.num_devices)
    try:
      planner.check_slices(self.topology, mesh)
      partitioning.check(self.cfg, mesh)
    except errors.InputError:
      return
    if ways:
      way = planner.exchange_kind(self.cfg, self.topology)
      counted = estimate_lib.estimate(self.cfg, mesh, self.request.max_vio or 0.0, way)
      shape = dict(mesh.shape)
      seconds = functools.cache(functools.partial(self._seconds, counted, shape))
      kept = functools.cache(functools.partial(self._kept, counted, mesh, way))
      for name, passes in ways:
        rule = SCHEDULES[name]
        yield self._with(name, passes, counted, shape, seconds(rule.built, passes), kept)

  def _passes(self, rule: Schedule) -> list[int]:
    """Into how many passes a schedule may cut the batch; empty if it cannot run it."""
    micros, p = self.micros, self.stages
    if not rule.built:
      return [1] if micros >= rule.least * p else []
    return [g for g in range(1, micros // p + 1) if micros % g == 0 and micros // g % p == 0]

  def _kept(
    self,
    counted: estimate_lib.Estimate,
    mesh: jax.sharding.AbstractMesh,
    way: str,
    built: bool,
  ) -> tuple[int, int]:
    """(bytes of activations that a micro-batch in flight keeps, of those there are once)."""
    kept = counted.temporaries[_KEPT]
    model = self.cfg.model
    if not built or model.remat != 'full':
      return kept, 0
    # The inputs of stages, not of layers; a stage is recomputed as a whole.
    whole = dataclasses.replace(self.cfg, model=dataclasses.replace(model, remat='none'))
    again = estimate_lib.estimate(whole, mesh, self.request.max_vio or 0.0, way)
    return kept // model.num_layers, again.temporaries[_KEPT]

  def _model_work(self) -> schema.Config:
    model = dataclasses.replace(self.whole.model, remat=self.cfg.model.remat)
    return dataclasses.replace(self.whole, model=model)

  def _seconds(
    self, counted: estimate_lib.Estimate, shape: dict[str, int], built: bool, passes: int
  ) -> dict[str, float]:
    """Of each resource, waiting left out."""
    vio, train = self.request.max_vio or 0.0, self.cfg.train
    tokens = train.batch_size * self.cfg.model.max_seq_len / self.request.topology.num_devices
    mean = estimate_lib.busiest_flops_per_token(self._model_work(), shape, vio) * tokens
    transfers = [
      dataclasses.replace(one, count=passes)
      if (one.kind, one.op_name) == ('all-reduce', 'gradients')
      and (not built or set(one.axes) <= set(partitioning.COPIES))
      else one
      for one in counted.collectives
    ]
    extents = planner.laid_out(self.topology, shape)
    flops = max(counted.flops, mean)
    line = roofline.roofline(self.topology, flops, counted.hbm_bytes, transfers, shape, extents)
    name, bandwidth = _link(self.request.topology)
    seconds = dict(line.seconds)
    seconds[name] += self._sent(shape, built) / bandwidth
    return seconds

  def _sent(self, shape: dict[str, int], built: bool) -> float:
    """Bytes to the stages before and after; what is built also moves a queue of rows."""
    return sent_bytes(self.cfg, shape) * (2 if built else 1)

  def _with(
    self,
    name: str,
    passes: int,
    counted: estimate_lib.Estimate,
    shape: dict[str, int],
    seconds: dict[str, float],
    kept_by: Callable[[bool], tuple[int, int]],
  ) -> Pipelined:
    """The step under a schedule."""
    rule, chip = SCHEDULES[name], self.topology.chip
    each, once = kept_by(rule.built)
    kept = each * rule.in_flight(self.stages, self.micros // passes) + once
    sizes = counted.arguments | counted.temporaries | {_KEPT: kept}
    copies = {part: rule.copies if part in _COPIED else 1 for part in sizes}
    if rule.built and stage_rules.num_layers(self.whole.model) % self.stages:
      copies['parameters'] += 1
      link, bandwidth = _link(self.request.topology)
      swapped = 2 * passes * counted.arguments['parameters'] / bandwidth
      seconds = seconds | {link: seconds[link] + swapped}
    most, total = max(seconds.values()), sum(seconds.values())

    def waiting(of: float) -> float:
      time = chunk(of / self.micros, estimate_lib.work(self._model_work()))
      return passes * rule.bubble(self.stages, time)

    bubble = waiting(most if rule.built else seconds['compute'])
    bound = most + bubble
    serial = total + (waiting(total) if rule.built else bubble)
    return Pipelined(
      schedule=name,
      stages=self.stages,
      mesh={axis: size for axis, size in shape.items() if size > 1},
      remat=self.cfg.model.remat,
      micro_batch_size=self.cfg.train.micro_batch_size,
      micro_batches=self.micros,
      passes=passes,
      hbm_bytes=sum(size * copies[part] for part, size in sizes.items()),
      hbm_capacity_bytes=chip.hbm_bytes,
      activation_bytes=kept,
      sent_bytes=self._sent(shape, rule.built),
      seconds=seconds,
      bubble_seconds=bubble,
      bubble_share=bubble / bound,
      step_seconds_bound=bound,
      step_seconds_one_by_one=serial,
    )


def chunk(seconds: float, work: estimate_lib.Work) -> Chunk:
  """A stage's arithmetic for a micro-batch, in parts: W is as much as F, B twice F and repeats."""
  forward = seconds * work.model / 3 / (work.model + work.repeated)
  return Chunk(forward, seconds - forward, forward)


def sent_bytes(stage: schema.Config, shape: dict[str, int]) -> float:
  """Bytes that a device of a middle stage sends in a step: activations on, gradients back.

  Devices of the tensor axis send a part each (arXiv 2104.04473, section 4.1).
  """
  ways = math.prod(shape[axis] for axis in (*partitioning.ROW_AXES, 'sequence', 'tensor'))
  tokens = stage.train.batch_size * stage.model.max_seq_len / ways
  return 2 * tokens * stage.model.embed_dim * jnp.dtype(stage.model.dtype).itemsize


def _link(topology: chips.Topology) -> tuple[str, float]:
  """(resource, bytes/s) between two stages: the slowest that some pair of them has."""
  chip = topology.chip
  if chip.kind == 'gpu':
    near = topology.num_devices <= chips.NODE
    return ('nvlink', chip.link_bandwidth) if near else ('dcn', chip.dcn_bandwidth)
  if topology.num_slices > 1:
    return 'dcn', chip.dcn_bandwidth
  return 'ici', chip.link_bandwidth
