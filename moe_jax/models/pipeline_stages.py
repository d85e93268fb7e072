"""A stack of layers as a pipeline: its leading axis cut along the mesh axis `stage` (GPipe).

The rows of a forward pass are cut into M parts, micro-batches, which follow each other through the
p stages: in tick t stage s works on part t - s and then hands it on (a collective permute), so that
all is done after M + p - 1 ticks. Of these a stage waits p - 1, the share (p - 1) / (M + p - 1)
(GPipe, arXiv 1811.06965, section 2.3); it computes on what is left over, which nothing reads. The
backward pass is the derivative of the loop: the same ticks in reverse order.

Before and behind these layers the stages share the rows, as data parallelism does. A stage keeps
the parts that come from its own rows in a queue of M / p places. In every tick one place moves by a
stage: parts to come towards the first, finished ones away from the last. After all ticks each
stage has back its own rows, with nothing ever whole on one device.

The stages have as many layers each where their number allows it; else the last ones have fewer, and
places without a layer hand on what they get. Weights are then kept cut along another axis, since
arrays are cut evenly only, and swapped once per forward pass (an all-to-all), which takes room for
a second copy of them.

Legend: p stages, M parts, b rows of a part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import errors, trees
from moe_jax.balance import router_stats
from moe_jax.config import router_traits, schema, stage_rules
from moe_jax.devices import partitioning
from moe_jax.models import decoder_block
from moe_jax.models.attention import multi_head
from moe_jax.models.routers import ROUTERS, routing

Array = jax.Array

# (variables, x [b, L, D], inputs of the layers, context, tokens) -> (x, statistics or None).
Layers = Callable[..., tuple[Array, router_stats.RouterStats | None]]

_KNOWN = ('params', 'router_state')


def number() -> int:
  """p of the mesh in force; 1 without a mesh."""
  return partitioning.axis_size(partitioning.STAGE)


def variables_of(model: nn.Module, name: str) -> dict[str, Any]:
  """What the stack of layers `name` of a model is applied with.

  Raises:
    errors.InputError: single layers are observed or changed, as an experiment on a trained model
      does.
  """
  collections = model.variables
  others = {key for key in collections if key not in _KNOWN}
  others |= {'intermediates'} if model.is_mutable_collection('intermediates') else set()
  errors.require(
    not others,
    f'config.mesh.stage={number()}: a pipeline neither observes nor changes single layers '
    f'(collections {", ".join(sorted(others))}); load the run on a mesh with stage=1',
  )
  return {key: tree[name] for key, tree in collections.items() if name in tree}


def apply(
  cfg: schema.ModelConfig,
  layers: Layers,
  variables: trees.Variables,
  own: decoder_block.LayerInputs,
  x: Array,
  ctx: multi_head.Context,
  tokens: routing.Tokens,
  *,
  train: bool,
  micro_batches: int,
) -> tuple[Array, router_stats.RouterStats | None]:
  """Applies a stack of layers, stage by stage.

  Args:
    cfg: the model.
    layers: applies the layers of one stage.
    variables: leaves [layers, ...].
    own: what each layer gets besides; leaves [layers, ...]. Its slopes are left to the caller.
    x: [B, L, D].
    ctx: positions and documents, [B, L].
    tokens: the batch as routing sees it.
    train: whether the pass is one of training.
    micro_batches: M; 0 = as many as `stage_rules.micro_batches` chooses.

  Returns:
    ([B, L, D], statistics with leaves [layers, ...], sums over the parts).

  Raises:
    errors.InputError: as `stage_rules` says, or recorded choices are to be taken over.
  """
  stages = number()
  _check(cfg, own)
  ways = partitioning.row_ways(jax.sharding.get_abstract_mesh()) // stages
  parts = stage_rules.micro_batches(cfg, micro_batches, len(x), stages, ways, train=train)
  cut = functools.partial(_cut, stages=stages, ways=ways, parts=parts)
  batch = jax.tree.map(lambda a: cut(a, None), (ctx, tokens._replace(seed=None)))
  dtypes = jax.tree.map(lambda a: a.dtype, variables['params'])

  def narrow(variables: trees.Variables, *inputs: Any) -> Any:
    params = jax.tree.map(lambda a, dtype: a.astype(dtype), variables['params'], dtypes)
    return layers({**variables, 'params': params}, *inputs)

  # Gradients add up over the ticks in the dtype of what the loop reads; bfloat16 would lose some.
  params = jax.tree.map(_widened, variables['params'])
  axes = jax.tree.map(lambda a: stage_rules.shared_axis(a.shape, stages), params)
  others = {key: tree for key, tree in variables.items() if key != 'params'}
  others = jax.tree.map(functools.partial(_padded, stages=stages), others)
  numbers = _padded(own.number, stages)
  numbers = jnp.where(jnp.arange(len(numbers)) < len(own.number), numbers, -1)

  def in_stage(place, params, others, numbers, queue, batch, seed):
    params = jax.tree.map(functools.partial(_of_stage, stages, place[0]), params, axes)
    variables = {**others, 'params': params}
    return _ticks(narrow, stages, place[0], variables, numbers, queue, batch, seed)

  stage, whole = jax.P(partitioning.STAGE), jax.P()
  rows = jax.P(partitioning.STAGE, partitioning.COPIES)
  weights = jax.tree.map(_layout, axes)
  in_specs = (stage, weights, stage, stage, rows, jax.P(None, partitioning.COPIES), whole)
  mapped = partitioning.per_stage(in_stage, in_specs, (rows, stage))
  place = jnp.arange(stages, dtype=jnp.int32)
  queue, stats = mapped(place, params, others, numbers, cut(x, 'act_parts'), batch, tokens.seed)
  stats = jax.tree.map(lambda a: a[: len(own.number)], stats)
  return _joined(queue, stages, ways), stats


def _layout(axis: int) -> jax.P:
  """Of a weight whose `axis` the stages share, see `stage_rules.shared_axis`."""
  return jax.P() if axis == stage_rules.WHOLE else jax.P(*[None] * axis, partitioning.STAGE)


def _padded(a: Array, stages: int) -> Array:
  """[layers, ...] with the last one repeated, up to a multiple of the stages."""
  return jnp.pad(a, [(0, -len(a) % stages)] + [(0, 0)] * (a.ndim - 1), mode='edge')


def _of_stage(stages: int, place: Array, leaf: Array, axis: int) -> Array:
  """Inside of a stage: the weights [places, ...] of its layers.

  Args:
    stages: p.
    place: [] int32, s.
    leaf: the stage's part of a weight [layers, ...].
    axis: along which it was cut, see `stage_rules.shared_axis`.
  """
  if axis == 0:
    return leaf
  leaf = _padded(leaf, stages)
  if axis == stage_rules.WHOLE:
    here = len(leaf) // stages
    return jax.lax.dynamic_slice_in_dim(leaf, place * here, here)
  return jax.lax.all_to_all(leaf, partitioning.STAGE, 0, axis, tiled=True)


def _check(cfg: schema.ModelConfig, own: decoder_block.LayerInputs):
  """Refuses what a part of the rows would decide otherwise than all of them."""
  stage_rules.check_model(cfg, number())
  errors.require(
    own.experts is None,
    f'config.mesh.stage={number()}: a pipeline takes over no recorded choices of experts; use a '
    'mesh with stage=1',
  )
  errors.require(
    not cfg.is_moe
    or not ROUTERS[cfg.moe.router].across_rows
    or cfg.moe.router in router_traits.LIBRARY,  # `stage_rules` knows those
    f'config.model.moe.router={cfg.moe.router!r} decides about all rows of a forward pass '
    f'(across_rows), which config.mesh.stage={number()} cuts into parts; use a mesh with stage=1',
  )


def _widened(leaf: Array) -> Array:
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _cut(a: Array, name: str | None, *, stages: int, ways: int, parts: int) -> Array:
  """[B, ...] -> [M, b, ...]; the rows of a part are neighbours on each device.

  Args:
    a: rows over all devices.
    name: logical axis of M; None = all parts in every stage.
    stages: p.
    ways: devices of a stage that have rows of their own.
    parts: M.
  """
  a = a.reshape(stages, ways, parts // stages, -1, *a.shape[1:]).swapaxes(1, 2)
  return _laid_out(a.reshape(parts, -1, *a.shape[4:]), name)


def _joined(a: Array, stages: int, ways: int) -> Array:
  """The inverse of `_cut`: [M, b, L, D] -> [B, L, D]."""
  a = _laid_out(a, 'act_parts')
  a = a.reshape(stages, -1, ways, a.shape[1] // ways, *a.shape[2:]).swapaxes(1, 2)
  a = a.reshape(-1, *a.shape[4:])
  return partitioning.constrain(a, 'act_batch', 'act_len', 'act_embed')


def _laid_out(a: Array, name: str | None) -> Array:
  """States the layout of [M, b, ...]."""
  return partitioning.constrain(a, *(name, 'act_part_batch', 'act_len', 'act_embed')[: a.ndim])


def _ticks(
  layers: Layers,
  stages: int,
  place: Array,
  variables: trees.Variables,
  number: Array,
  queue: Array,
  batch: tuple[multi_head.Context, routing.Tokens],
  seed: Array,
) -> tuple[Array, Any]:
  """Inside of a stage: all ticks of a forward pass.

  Args:
    layers: applies the layers of a stage.
    stages: p.
    place: [] int32, s.
    variables: leaves [layers / p, ...].
    number: [layers / p] int32, numbers of the layers; -1 = a place without one.
    queue: [M / p, b, L, D], the parts of the stage's own rows; b on this copy of the weights.
    batch: of all parts, leaves [M, b, ...].
    seed: [] uint32.

  Returns:
    (queue with the results in the same places; sums of the statistics over all rows,
    [layers / p, ...]).
  """
  places = len(queue)
  parts = stages * places
  own = decoder_block.LayerInputs(None, number, {})
  onwards = [(s, s + 1) for s in range(stages - 1)]
  backwards = [(s + 1, s) for s in range(stages - 1)]

  def work(x: Array, part: Array) -> Any:
    ctx, tokens = jax.tree.map(lambda a: a[part], batch)
    return layers(variables, x, own, ctx, tokens._replace(seed=seed))

  def tick(carry, t):
    queue, arrived, total = carry
    waiting = queue[t % places]
    part = t - place
    busy = (part >= 0) & (part < parts)
    x = jnp.where(place == 0, waiting, arrived)
    x, stats = work(x, jnp.clip(part, 0, parts - 1))
    total = jax.tree.map(lambda a, b: a + jnp.where(busy, b, 0), total, stats)
    moved = jax.lax.ppermute(waiting, partitioning.STAGE, backwards)
    queue = queue.at[t % places].set(jnp.where(place == stages - 1, x, moved))
    return (queue, jax.lax.ppermute(x, partitioning.STAGE, onwards), total), None

  # A stage that waits works on some part or other: real numbers, so that no gradient is NaN.
  shapes = jax.eval_shape(work, queue[0], place)[1]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  ticks = jnp.arange(parts + stages - 1, dtype=jnp.int32)
  (queue, _, total), _ = jax.lax.scan(tick, (queue, queue[0], zeros), ticks)
  total = jax.lax.psum(total, partitioning.COPIES)
  # In tick t = m + p - 1, which finished part m, it was place t % (M / p) that moved.
  return jnp.roll(queue, 1 - stages, axis=0), total
