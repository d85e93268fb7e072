"""Which module is the first that is not finite in a step: weights, activations, gradients.

Looked for in forward order: the batch, then every weight, then what every module returns for the
batch (one pass with a watch on all modules, which keeps one bool per layer and row), and last the
gradients, where the last in forward order is the first that the backward pass came to. An expert is
found by computing its layer again, expert by expert.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax import integer_hash, trees
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.models import decoder_block, layers, moe_layer, transformer
from moe_jax.training import lora, objective, optim, trainable

Array = jax.Array

# Names of modules and parameters as data passes them; those of a block begin anew in every layer.
_ORDER = (
  *('embedding', 'dense_layers', 'moe_layers', 'final_norm', 'head', 'mtp_layers'),
  *('embedding_norm', 'hidden_norm', 'projection', 'block', 'attention_norm', 'attention'),
  *('q', 'q_a', 'q_a_norm', 'q_b', 'kv_a', 'kv_a_norm', 'kv_b', 'k', 'v', 'o'),
  *('ffn_norm', 'mlp', 'moe', 'router', 'expert_bias', 'scores', 'gates', 'shared'),
  *('gate_up', 'down', 'scale', 'norm'),
)
_STACKS = ('dense_layers', 'moe_layers', 'mtp_layers')
_EXPERTS = ('gate_up', 'down')  # of a MoE layer: [layers, E, ...]
_WATCHED = 'finite'


class Found(NamedTuple):
  """The first place that is not finite."""

  kind: str  # 'batch', 'weight', 'activation' or 'gradient'
  where: str  # 'layer 2, expert 5, moe/gate_up'
  rows: tuple[int, ...] = ()  # of the batch, where only some of them are not finite


class Replay(NamedTuple):
  """One step, taken again without its update."""

  loss: float
  grad_norm: float
  found: Found | None  # None: all is finite here


def replay(
  cfg: schema.Config,
  mesh: jax.sharding.Mesh,
  state: Mapping[str, Any],
  batch: trees.HostBatch,
  step: int,
) -> Replay:
  """Takes a step again and looks for the first thing in it that is not finite.

  Args:
    cfg: the run.
    mesh: the devices.
    state: seed, params and router_state before the step, on the mesh.
    batch: arrays [B, L], whole.
    step: steps done before it.
  """
  with partitioning.activate(mesh):
    on_mesh = partitioning.put_batch(objective.inputs(batch), mesh)
    seed = integer_hash.combine(state['seed'], jnp.uint32(step))
    weight = optim.mtp_weight(cfg.train, jnp.int32(step))
    loss, grads = jax.jit(functools.partial(objective.gradients, cfg))(
      state['params'], state['router_state'], on_mesh, seed, weight
    )
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
    variables = {'params': state['params'], 'router_state': state['router_state']}
    merged = {**variables, 'params': lora.merged(state['params'])}
    found = (
      in_batch(cfg.model, batch)
      or in_weights(cfg.model, variables)
      or in_activations(cfg, mesh, merged, batch, seed)
      or in_gradients(cfg.model, trainable.expanded(cfg, state['params'], grads))
    )
  return Replay(float(loss.main), float(norm), found)


def in_batch(model: schema.ModelConfig, batch: trees.HostBatch) -> Found | None:
  """A token that the vocabulary does not have."""
  wrong: Any = (batch['tokens'] < 0) | (batch['tokens'] >= model.vocab_size)
  if not wrong.any():
    return None
  row, place = (int(i) for i in np.argwhere(wrong)[0])
  token = int(batch['tokens'][row, place])
  where = f'token {token} at {place}, outside of vocab_size={model.vocab_size}'
  return Found('batch', where, _rows(wrong.any(axis=1)))


def in_weights(model: schema.ModelConfig, variables: trees.Variables) -> Found | None:
  """The first weight or entry of the router state, in forward order."""
  both = [
    (names, leaf)
    for collection in ('params', 'router_state')
    for names, leaf in _leaves(variables[collection])
  ]
  places = [place for names, leaf in both for place in _bad_places(names, leaf)]
  if not places:
    return None
  names, index = min(places, key=lambda place: _key(*place))
  return Found('weight', _text(model, names, index))


def in_gradients(model: schema.ModelConfig, grads: trees.Tree) -> Found | None:
  """The gradient that the backward pass came to first: the last in forward order."""
  places = [
    place
    for names, leaf in _leaves(grads)
    for place in (*_bad_places(names, leaf), *_bad_places(names, leaf, last=True))
  ]
  if not places:
    return None
  names, index = max(places, key=lambda place: _key(*place))
  return Found('gradient', _text(model, names, index))


def in_activations(
  cfg: schema.Config,
  mesh: jax.sharding.Mesh,
  variables: trees.Variables,
  batch: trees.HostBatch,
  seed: Array,
) -> Found | None:
  """The first module whose output is not finite for some rows, micro-batch by micro-batch."""
  num_rows = len(batch['tokens'])
  num_micro = num_rows // (cfg.train.micro_batch_size or num_rows)
  for i in range(num_micro):
    numbers = np.arange(num_rows, dtype=np.int32)[i::num_micro]
    micro = {key: value[i::num_micro] for key, value in objective.inputs(batch).items()}
    rows = partitioning.put_batch(micro, mesh) | {'row': jnp.asarray(numbers)}
    flags = jax.device_get(_watched(cfg.model, variables, rows, seed))
    bad = [
      (tuple(name.split('/')), layer, flag)
      for name, flag in flags.items()
      for layer in _bad_layers(name, flag)
    ]
    if bad:
      names, layer, flag = min(bad, key=lambda place: _key(place[0], place[1]))
      fine = flag[layer[0]] if layer else flag
      where = _text(cfg.model, names, layer)
      if names[-1] == 'moe':
        where = _expert(cfg.model, variables, rows, seed, names, layer[0]) or where
      return Found('activation', where, tuple(int(n) for n in numbers[~fine]))
  return None


def _apply(
  cfg: schema.ModelConfig, variables: trees.Variables, rows: trees.Batch, seed: Array
) -> Any:
  """(Output, intermediates) of a training pass."""
  model: Any = transformer.Transformer(cfg, True)
  inputs = (rows[key] for key in ('tokens', 'positions', 'segment_ids'))
  options: dict[str, Any] = {'targets': rows['targets'], 'row': rows['row'], 'seed': seed}
  return model.apply(variables, *inputs, **options, mutable=['intermediates'])


@functools.partial(jax.jit, static_argnums=0)
def _watched(
  cfg: schema.ModelConfig, variables: trees.Variables, rows: trees.Batch, seed: Array
) -> dict[str, Array]:
  """Whether all is finite, by path of the module, [layers, B] in a stack and [B] outside of one."""
  shape = rows['tokens'].shape

  def watch(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if context.method_name == '__call__':
      values = (x for x in jax.tree.leaves(out) if jnp.shape(x)[:2] == shape)
      first = next((x for x in values if jnp.issubdtype(x.dtype, jnp.floating)), None)
      if first is not None:
        context.module.sow('intermediates', _WATCHED, _finite_rows(first))
    return out

  with nn.intercept_methods(watch):
    sown = _apply(cfg, variables, rows, seed)[1]
  flags = dict(_flags(sown['intermediates']))
  ids = jnp.clip(rows['tokens'], 0, cfg.vocab_size - 1)
  flags['embedding'] = _finite_rows(transformer.embedded(ids, variables['params']['embedding']))
  return flags


def _flags(sown: Mapping[str, Any], path: str = '') -> Iterator[tuple[str, Array]]:
  """What was sown by a watch, by path; the scores and gates of a layer are watched here."""
  for name, value in sown.items():
    if isinstance(value, Mapping):
      yield from _flags(value, f'{path}{name}/')
    elif name in ('scores', 'gates'):
      yield path + name, jnp.isfinite(value[0]).all(axis=(-2, -1))
    elif name == _WATCHED:
      # Of a stack: by layer, from inside of the loop. Of the whole model: its logits.
      yield path[:-1] or 'head', value[0]


def _finite_rows(x: Array) -> Array:
  """[B, L, ...] -> [B]."""
  return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def _expert(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  rows: trees.Batch,
  seed: Array,
  names: tuple[str, ...],
  layer: int,
) -> str | None:
  """The first expert and matrix of a MoE layer whose output is not finite; None if none is."""
  x, chosen = (stack[layer] for stack in _routed(cfg, names, variables, rows, seed))
  weights = functools.reduce(lambda tree, name: tree[name], names, variables['params'])
  tokens, chosen = x.reshape(-1, x.shape[-1]), np.asarray(chosen).reshape(-1, chosen.shape[-1])
  for expert in range(cfg.moe.num_experts):
    own = tokens[np.flatnonzero((chosen == expert).any(axis=-1))]
    gate_up, down = (weights[name][layer, expert].astype(x.dtype) for name in _EXPERTS)
    h = jnp.einsum('TD,DUF->TUF', own, gate_up)
    steps = {
      'gate_up (gate)': h[:, 0],
      'gate_up (up)': h[:, 1],
      'swiglu': layers.swiglu(h),
      'down': layers.swiglu(h) @ down,
    }
    for step, value in steps.items():
      if not bool(jnp.isfinite(value).all()):
        return _text(cfg, (*names, step), (layer, expert))
  return None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _routed(
  cfg: schema.ModelConfig,
  names: tuple[str, ...],
  variables: trees.Variables,
  rows: trees.Batch,
  seed: Array,
) -> tuple[Array, Array]:
  """Inputs [layers, B, L, D] and experts [layers, B, L, K] of the MoE layers at a path."""

  def inputs(call, args, kwargs, context):
    if context.method_name == '__call__' and isinstance(context.module, moe_layer.MoE):
      context.module.sow('intermediates', 'moe_inputs', args[0])
    return call(*args, **kwargs)

  with nn.intercept_methods(inputs):
    sown = _apply(cfg, variables, rows, seed)[1]['intermediates']
  sown = functools.reduce(lambda tree, name: tree[name], names, sown)
  return sown['moe_inputs'][0], sown['expert_idx'][0]


def _leaves(tree: trees.Tree) -> Iterator[tuple[tuple[str, ...], Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield tuple(entry.key for entry in path), leaf


def _bad_places(
  names: tuple[str, ...], leaf: Array, last: bool = False
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
  """[(names, index of the first number that is not finite)], or of the last; [] without any."""
  if not jnp.issubdtype(leaf.dtype, jnp.floating) or bool(jnp.isfinite(leaf).all()):
    return []
  flat = jnp.isfinite(leaf).reshape(-1)
  place = int(flat.size - 1 - jnp.argmin(flat[::-1])) if last else int(jnp.argmin(flat))
  return [(names, tuple(int(i) for i in np.unravel_index(place, leaf.shape)))]


def _bad_layers(path: str, fine: np.ndarray) -> list[tuple[int, ...]]:
  """Indices of the layers of a stack, flags [layers, B], that are not finite; () for a module."""
  if path.partition('/')[0] not in _STACKS:
    return [] if fine.all() else [()]
  return [(int(i),) for i in np.flatnonzero(~fine.all(axis=-1))]


def _key(names: Sequence[str], index: Sequence[int]) -> tuple[Any, ...]:
  """Sorts places in forward order: a module's own output comes after those of its parts."""
  ranks = [_ORDER.index(name) if name in _ORDER else len(_ORDER) for name in names]
  stack = [ranks.pop(0), index[0]] if names[0] in _STACKS and index else []
  return (*stack, *ranks, len(_ORDER) + 1)


def _text(model: schema.ModelConfig, names: Sequence[str], index: Sequence[int]) -> str:
  """'layer 2, expert 5, moe/gate_up (gate) [3, 1]', with numbers of layers in the whole model."""
  parts, rest = [], list(index)
  if names[0] in _STACKS and rest:
    starts = {stack.name: stack.first for stack in decoder_block.stacks(model)}
    first, names = starts.get(names[0], model.num_layers), names[1:]
    parts.append(f'layer {first + rest.pop(0)}')
    routed = names[-2:-1] == ('moe',) and names[-1].startswith((*_EXPERTS, 'swiglu'))
    if routed:
      parts.append(f'expert {rest.pop(0)}')
  matrix = '/'.join(names) or 'output'
  if names and names[-1] == 'gate_up' and len(rest) == 3:  # [D, gate or up, F]
    matrix += f' ({("gate", "up")[rest.pop(1)]})'
  return ', '.join([*parts, matrix]) + (f' at {rest}' if rest else '')


def _rows(wrong: np.ndarray) -> tuple[int, ...]:
  return tuple(int(i) for i in np.flatnonzero(wrong))
