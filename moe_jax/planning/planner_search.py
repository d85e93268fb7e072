"""Tries meshes, remat policies and micro-batches: all of them by shapes, the best by compiling.

A candidate's mesh has powers of two along `data`, `fsdp`, `expert` and `tensor`. The axes `dcn_*`
share the slices of a topology in every way, unless the config's already multiply to their number;
rows of at least LONG tokens are split over `sequence`, unless the config splits them.
"""

import dataclasses
import math
from collections.abc import Iterator

import tqdm

from moe_jax import errors
from moe_jax.config import mesh_config, schema
from moe_jax.devices import partitioning
from moe_jax.planning import chips, planner

REMATS = ('none', 'moe_core', 'full')
# Estimates of memory are rough: candidates up to this share of the capacity go to the compiler.
LIKELY = 0.95
MAX_TENSOR = 4
LONG = 16_384  # tokens of a row; a batch of such rows is few of them, which leave devices over
MAX_LONG = 16  # of tensor and of sequence, for such rows
MICROS = (1, 2, 3, 4, 5)  # rows of a device at a time
GIB = 2**30
LARGER = 5  # doublings of a topology that is too small
SPEED_ALIKE = 1.02  # bounds that close are as good

Pair = tuple[planner.Plan, schema.Config]


def search(
  request: planner.Request, best: int, *, progress: bool = False
) -> tuple[list[planner.Plan], int]:
  """The best plans that fit, best first, and how many candidates there were.

  Args:
    request: the config's mesh, remat and micro-batch are what is tried.
    best: how many plans to return; compiled until so many fit, or twice as many were compiled.
    progress: show bars.

  Raises:
    errors.InputError: no candidate fits the sizes of the model, or none the memory.
  """
  planner.check_stages(mesh_config.sizes(request.cfg.mesh)[partitioning.STAGE])
  ranked = _ranked(request, progress)
  name = request.topology.name
  errors.require(
    bool(ranked),
    f'--topology={name}: no mesh of {request.topology.num_devices} devices divides the sizes of '
    'the model and config.train.batch_size; choose another topology or batch size',
  )
  fitting = _fitting(ranked)
  if not fitting:
    least = min(ranked, key=lambda pair: pair[0].hbm_bytes)[0]
    ways = larger(request)
    raise errors.InputError(
      f'--topology={name}: none of {len(ranked)} candidates fits, the smallest needs about '
      f'{least.hbm_bytes / GIB:.0f} of {least.hbm_capacity_bytes / GIB:.0f} GiB per device; choose '
      f'{" or ".join(ways) or "a larger topology"}, or fewer rows per device'
    )
  if request.estimate or request.topology.chip.kind == 'gpu':
    return [candidate for candidate, _ in fitting[:best]], len(ranked)
  plans = []
  for _, cfg in fitting[: 2 * best]:
    plans.append(planner.plan(dataclasses.replace(request, cfg=cfg), progress=progress))
    if sum(plan.fits for plan in plans) == best:
      break
  return sorted((plan for plan in plans if plan.fits), key=_order), len(ranked)


def _ranked(request: planner.Request, progress: bool = False) -> list[Pair]:
  """Every candidate that divides, with its estimate."""
  ranked = []
  options = list(candidates(request.cfg, request.topology))
  for cfg in tqdm.tqdm(options, desc='candidates', disable=None if progress else True):
    try:
      plan = planner.plan(dataclasses.replace(request, cfg=cfg, estimate=True))
    except errors.InputError:
      continue
    ranked.append((plan, cfg))
  return ranked


def _fitting(ranked: list[Pair]) -> list[Pair]:
  """Those that are likely to fit, best first."""
  fit = [pair for pair in ranked if pair[0].hbm_bytes <= LIKELY * pair[0].hbm_capacity_bytes]
  return sorted(fit, key=lambda pair: _order(pair[0]))


def _order(plan: planner.Plan) -> tuple[int, float]:
  """By the bound in steps of 2 %, then by all times together: they never overlap completely."""
  return round(math.log(plan.step_seconds_bound, SPEED_ALIKE)), sum(plan.seconds.values())


def candidates(cfg: schema.Config, topology: chips.Topology) -> Iterator[schema.Config]:
  """Configs with other meshes, remat policies and micro-batches."""
  for fixed in _fixed_axes(cfg, topology):
    free = topology.num_devices // math.prod(fixed.values())
    tensor = MAX_LONG if cfg.model.max_seq_len >= LONG else MAX_TENSOR
    for mesh in _meshes(free, cfg.model.moe.num_experts if cfg.model.is_moe else 1, tensor):
      yield from _variants(cfg, fixed | mesh)


def _fixed_axes(cfg: schema.Config, topology: chips.Topology) -> Iterator[dict[str, int]]:
  """Sizes of the axes between slices and of `sequence`, the largest pieces of rows first."""
  sizes, slices = mesh_config.sizes(cfg.mesh), topology.num_slices
  between = {name: max(1, sizes[name]) for name in partitioning.DCN_AXES}
  splits = [between]
  if slices not in (1, math.prod(between.values())):
    copies = [n for n in range(1, slices + 1) if slices % n == 0]
    splits = [{'dcn_data': n, 'dcn_fsdp': slices // n} for n in copies]
  pieces = [max(1, sizes['sequence'])]
  if pieces == [1] and cfg.model.max_seq_len >= LONG:
    pieces = _powers(MAX_LONG)
  for split in splits:
    for sequence in pieces:
      yield split | {'sequence': sequence}


def _meshes(free: int, num_experts: int, max_tensor: int) -> Iterator[dict[str, int]]:
  """Sizes of the other axes, for `free` devices."""
  for expert in _powers(min(free, num_experts)):
    for tensor in _powers(min(max_tensor, free // expert)):
      for data in _powers(free // expert // tensor):
        fsdp, rest = divmod(free, expert * tensor * data)
        if not rest:
          yield {'data': data, 'fsdp': fsdp, 'expert': expert, 'tensor': tensor}


def _variants(cfg: schema.Config, mesh: dict[str, int]) -> Iterator[schema.Config]:
  ways = math.prod(size for name, size in mesh.items() if name not in ('sequence', 'tensor'))
  batch = cfg.train.batch_size
  micros = {ways * rows for rows in MICROS} | {batch}
  micros = sorted(m for m in micros if m <= batch and batch % m == 0)
  for micro in micros:
    for remat in REMATS:
      yield dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(cfg.mesh, **mesh),
        model=dataclasses.replace(cfg.model, remat=remat),
        train=dataclasses.replace(cfg.train, micro_batch_size=micro),
      )


def _powers(largest: int) -> list[int]:
  return [2**i for i in range(int(math.log2(max(1, largest))) + 1)]


def suggestions(request: planner.Request, tried: planner.Plan) -> list[str]:
  """What would fit instead, by the estimate: one change, else several, else a larger topology."""
  lines = []
  for text, cfg in _changes(request.cfg, request.topology.num_devices):
    try:
      other = planner.plan(dataclasses.replace(request, cfg=cfg, estimate=True))
    except errors.InputError:
      continue
    if other.hbm_bytes < LIKELY * tried.hbm_capacity_bytes:
      lines.append(f'{text} (about {other.hbm_bytes / GIB:.0f} GiB per device)')
  if lines or request.decode:
    return lines or larger(request)
  fitting = _fitting(_ranked(request))
  return [_arguments(*pair) for pair in fitting[:1]] or larger(request)


def larger(request: planner.Request) -> list[str]:
  """The first larger topology on which some candidate is likely to fit."""
  grown = request
  for _ in range(LARGER):
    grown = _doubled(grown)
    fitting = _fitting(_ranked(grown))
    if fitting:
      return [f'--topology={grown.topology.name} {_arguments(*fitting[0])}']
  return []


def _doubled(request: planner.Request) -> planner.Request:
  """Twice the devices: the shortest dimension grows, as pods do; beyond a pod, the slices.

  GPUs beyond a node are whole nodes, so that 6 of them become 8 and not 12.
  """
  topology, mesh = request.topology, request.cfg.mesh
  dims = list(topology.dims)
  if topology.chip.kind == 'gpu':
    topology = dataclasses.replace(topology, dims=(chips.gpus(2 * dims[0]),))
  elif topology.chip.torus == 2 and min(dims) >= topology.chip.wraps:
    topology = dataclasses.replace(topology, num_slices=2 * topology.num_slices)
    mesh = dataclasses.replace(mesh, dcn_fsdp=2 * mesh.dcn_fsdp)
  else:
    dims[max(i for i, size in enumerate(dims) if size == min(dims))] *= 2
    topology = dataclasses.replace(topology, dims=tuple(dims))
  return dataclasses.replace(
    request, topology=topology, cfg=dataclasses.replace(request.cfg, mesh=mesh)
  )


def _arguments(plan: planner.Plan, cfg: schema.Config) -> str:
  mesh = ','.join(f'{axis}={size}' for axis, size in plan.mesh.items())
  return (
    f'--mesh={mesh} --config.model.remat={cfg.model.remat} '
    f'--config.train.micro_batch_size={plan.micro_batch_size} '
    f'(about {plan.hbm_bytes / GIB:.0f} GiB per device)'
  )


def _changes(cfg: schema.Config, num_devices: int) -> Iterator[tuple[str, schema.Config]]:
  """(words, config) of single changes that may help, the cheapest first."""

  def part(name, **values):
    return dataclasses.replace(cfg, **{name: dataclasses.replace(getattr(cfg, name), **values)})

  order = schema.REMAT_POLICIES
  for remat in order[order.index(cfg.model.remat) + 1 :]:
    yield f'--config.model.remat={remat}', part('model', remat=remat)
  micro = cfg.train.micro_batch_size or cfg.train.batch_size
  while micro % 2 == 0:
    micro //= 2
    yield f'--config.train.micro_batch_size={micro}', part('train', micro_batch_size=micro)
  sizes = mesh_config.resolve(cfg.mesh, num_devices)
  while sizes['data'] % 2 == 0:
    sizes = sizes | {'data': sizes['data'] // 2, 'fsdp': sizes['fsdp'] * 2}
    written = ','.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1)
    yield f'--mesh={written}', part('mesh', **sizes)
  if cfg.optim.moment_dtype == 'float32':
    yield '--config.optim.moment_dtype=bfloat16', part('optim', moment_dtype='bfloat16')
