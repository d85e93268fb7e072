"""What a pipeline of stages (`mesh.stage`) accepts, and into how many parts it cuts the rows.

A pipeline must change nothing but speed and memory. Its parts of the rows are forward passes of
their own, so whatever is decided over rows together has to lie within a part: the groups of a
capacity, the chunks of a router. Balance losses do not: their sums are added up over the parts.
"""

from collections.abc import Mapping

from moe_jax import errors
from moe_jax.config import router_traits, schema

# Parts per stage where nobody has said how many: (p - 1) / (5 p - 1) of the time is waiting.
PARTS_PER_STAGE = 4
WHOLE = -1  # no axis is shared


def check(cfg: schema.Config, shape: Mapping[str, int], row_axes: tuple[str, ...]):
  """Refuses what a pipeline does not do, or would do otherwise than without it.

  Args:
    cfg: the run.
    shape: sizes of the mesh's axes.
    row_axes: those that split the rows of a part, `stage` left out.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  stages = shape['stage']
  if stages == 1:
    return
  _check_kinds(cfg, stages)
  check_model(cfg.model, stages)
  ways = 1
  for axis in row_axes:
    ways *= shape[axis]
  train, wanted = cfg.train, cfg.mesh.stage_micro_batches
  sizes = {train.micro_batch_size} if train.micro_batch_size else set()
  for rows in sizes or {train.batch_size, *(size for _, size in train.batch_ramp)}:
    micro_batches(cfg.model, wanted, rows, stages, ways, train=True)
  rows = train.micro_batch_size or train.batch_size
  micro_batches(cfg.model, 0, rows, stages, ways, train=False)


def _check_kinds(cfg: schema.Config, stages: int):
  """Stages of training that read or change single layers, or generate."""
  way_out = f'set config.mesh.stage=1 (it is {stages}); a checkpoint continues on any mesh'
  errors.require(
    cfg.trainable.kind == 'all',
    f'config.trainable.kind={cfg.trainable.kind!r} changes weights of single layers, which a '
    f'pipeline keeps apart; {way_out}',
  )
  errors.require(
    cfg.objective.kind != 'policy',
    f"config.objective.kind='policy' generates while it trains, which a pipeline does not do; "
    f'{way_out}',
  )


def check_model(model: schema.ModelConfig, stages: int):
  """Refuses a model with fewer layers than stages, or whose router sees all rows.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  layers, kind = num_layers(model), 'MoE layers' if model.is_moe else 'layers'
  errors.require(
    stages <= layers,
    f'config.mesh.stage={stages} must be at most the number of {kind}, {layers}, which the stages '
    f'share; choose at most {layers}',
  )
  errors.require(
    model.remat != 'offload',
    f"config.model.remat='offload' keeps the inputs of layers on the host, which mesh.stage="
    f"{stages} does not; choose 'full', which keeps the inputs of stages",
  )
  if model.is_moe:
    _check_router(model, stages)


def _check_router(model: schema.ModelConfig, stages: int):
  moe, length = model.moe, model.max_seq_len
  traits, bound = router_traits.of(moe), router_traits.of(moe).bound
  cuts = f'which mesh.stage={stages} cuts into parts'
  errors.require(
    'inference' not in traits.options or moe.options.inference != 'threshold_topk',
    "config.model.moe.options.inference='threshold_topk' is a budget of all rows of a forward "
    f'pass, {cuts}; choose another rule',
  )
  if bound is None:
    return
  errors.require(
    bound.consecutive(moe),
    f'config.model.moe.router={moe.router!r} deals the tokens of all rows of a forward pass to its '
    f'chunks, {cuts}; set model.moe.options.shuffle_chunks=False',
  )
  chunk = bound.chunk(moe, length)
  errors.require(
    chunk % length == 0 or length % chunk == 0,
    f'config.model.moe.router={moe.router!r} has chunks of {chunk} tokens, which with mesh.stage='
    f'{stages} must be whole rows of {length}, or parts of one; choose {length} or a divisor of it',
  )


def num_layers(model: schema.ModelConfig) -> int:
  """The layers that are shared by the stages: the MoE layers, or all of a dense model."""
  return model.num_moe_layers if model.is_moe else model.num_layers


def layers_of_a_stage(layers: int, stages: int) -> int:
  """The most that a stage has; the last stages may have fewer."""
  return -(-layers // stages)


def shared_axis(shape: tuple[int, ...], stages: int) -> int:
  """Which axis of a stacked weight the stages share: 0, or another where they are unequal.

  Args:
    shape: [layers, ...].
    stages: p.

  Returns:
    0 where `layers` is a multiple of p; else the longest other axis that is one; `WHOLE` where none
    is, and every stage keeps all.
  """
  if shape[0] % stages == 0:
    return 0
  fitting = [axis for axis in range(1, len(shape)) if shape[axis] % stages == 0]
  return max(fitting, key=lambda axis: shape[axis], default=WHOLE)


def micro_batches(
  model: schema.ModelConfig, wanted: int, rows: int, stages: int, ways: int, *, train: bool
) -> int:
  """M, into how many parts a pipeline cuts the rows of a forward pass.

  Args:
    model: whose rows compete in groups.
    wanted: `mesh.stage_micro_batches`; 0 = the most up to `PARTS_PER_STAGE` per stage that fit.
    rows: of the forward pass, over all devices.
    stages: p.
    ways: devices of a stage that have rows of their own.
    train: whether the pass is one of training.

  Raises:
    errors.InputError: rows or groups cannot be cut so.
  """
  group = _rows_together(model, train)

  def fits(parts: int) -> bool:
    return rows % (parts * ways) == 0 and rows // (parts * ways) % group == 0

  if wanted:
    errors.require(
      wanted % stages == 0,
      f'config.mesh.stage_micro_batches={wanted} must be a multiple of config.mesh.stage={stages}; '
      f'choose {-(-wanted // stages) * stages}, or 0 for what the rows allow',
    )
    fitting = [n for n in range(stages, rows + 1, stages) if fits(n)]
    errors.require(
      fits(wanted),
      f'config.mesh.stage_micro_batches={wanted} cannot cut {rows} rows on {ways} devices of a '
      f'stage into groups of {group} that stay together; choose '
      f'{" or ".join(map(str, fitting)) or "more rows"}',
    )
    return wanted
  for per_stage in range(PARTS_PER_STAGE, 0, -1):
    if fits(per_stage * stages):
      return per_stage * stages
  raise errors.InputError(
    f'config.mesh.stage={stages} cuts the {rows} rows of a forward pass into at least {stages} '
    f'parts on {ways} devices each, in which groups of {group} rows must stay together; choose '
    f'train.batch_size (or micro_batch_size) as a multiple of {stages * ways * group}'
  )


def _rows_together(model: schema.ModelConfig, train: bool) -> int:
  """Neighbouring rows about which something is decided together."""
  moe = model.moe
  if not model.is_moe:
    return 1
  bound = router_traits.of(moe).bound
  if bound:
    return max(1, bound.chunk(moe, model.max_seq_len) // model.max_seq_len)
  if moe.capacity.policy == 'none' or not (train or moe.capacity.at_eval):
    return 1
  errors.require(
    moe.capacity.group_rows > 0,
    'config.model.moe.capacity.group_rows=0 lets all rows of a forward pass compete, which '
    'config.mesh.stage cuts into parts; choose a number of rows',
  )
  return moe.capacity.group_rows
