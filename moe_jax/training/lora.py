"""LoRA (arXiv 2106.09685): W + alpha / rank A B in place of every matrix W of a frozen model.

A and B lie in the state as `params['lora']`, nested like their matrices, and alpha / rank as its
`scale`. Every expert has a pair of its own, and so have gate and up. Embedding, head and the
modules of multi-token prediction have none. Whoever computes with weights takes `merged` ones.

Axis letters: d what a matrix reads, r the rank, a the attention's experts.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import trees
from moe_jax.config import schema

KEY, SCALE = 'lora', 'scale'
# A, B and the matrix by its name; stacked layers and experts come before these axes.
_FORMS = {
  **dict.fromkeys(('q', 'k', 'v', 'q_b', 'kv_b'), 'dr,rnh->dnh'),
  'o': 'nhr,rd->nhd',
  **dict.fromkeys(('q_a', 'kv_a', 'router', 'down'), 'dr,ro->do'),
  'gate_up': 'dur,urf->duf',
}


def started(cfg: schema.Config, params: trees.Params, rng: jax.Array) -> trees.Params:
  """`params` with a pair for every matrix, A random and B zero; as they are without LoRA.

  The leaves may be boxed with logical axis names, and those of the pairs are then, too.
  """
  if cfg.trainable.kind != 'lora':
    return params
  pairs: dict[str, Any] = {SCALE: jnp.float32(cfg.trainable.lora_alpha / cfg.trainable.lora_rank)}
  for number, (path, leaf) in enumerate(_matrices(params)):
    *outer, name = path
    inside = pairs
    for part in outer:
      inside = inside.setdefault(part, {})
    key = jax.random.fold_in(rng, number)
    inside[name] = _pair(_FORMS[name], leaf, cfg.trainable.lora_rank, key)
  return {**params, KEY: pairs}


def merged(params: trees.Params) -> trees.Params:
  """The weights that a model computes with; `params` themselves where they have no pairs."""
  if KEY not in params:
    return params
  base = {name: value for name, value in params.items() if name != KEY}
  return _sums(base, params[KEY], params[KEY][SCALE])


def delta(name: str, a: Any, b: Any, scale: Any) -> jax.Array:
  """scale A B, float32, of the matrix `name`, a key of `_FORMS`; any leading axes."""
  left, right, out = _FORMS[name].replace('->', ',').split(',')
  form = f'...{left},...{right}->...{out}'
  return scale * jnp.einsum(form, a, b, precision=jax.lax.Precision.HIGHEST)


def add(name: str, weight: Any, a: Any, b: Any, scale: Any) -> jax.Array:
  """W + scale A B in the dtype of W."""
  return (weight.astype(jnp.float32) + delta(name, a, b, scale)).astype(weight.dtype)


def _sums(base: trees.Json, pairs: trees.Json, scale: jax.Array) -> dict[str, Any]:
  def of(name: str, value: Any) -> Any:
    if name not in pairs:
      return value
    if isinstance(value, Mapping):
      return _sums(value, pairs[name], scale)
    return add(name, value, pairs[name]['a'], pairs[name]['b'], scale)

  return {name: of(name, value) for name, value in base.items()}


def _matrices(
  tree: trees.Json, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  """(path, leaf) of every matrix that has a pair, by name."""
  for name in sorted(tree):
    if isinstance(tree[name], Mapping) and (*path, name) != ('mtp_layers',):
      yield from _matrices(tree[name], (*path, name))
    elif name in _FORMS:
      yield (*path, name), tree[name]


def _pair(form: str, leaf: Any, rank: int, key: jax.Array) -> dict[str, Any]:
  """A and B of a matrix, A with variance 1 / (what it reads)."""
  left, right, out = form.replace('->', ',').split(',')
  boxed = isinstance(leaf, nn.LogicallyPartitioned)
  shape = (leaf.value if boxed else leaf).shape
  lead = len(shape) - len(out)
  sizes = dict(zip(out, shape[lead:])) | {'r': rank}
  reads = math.prod(sizes[axis] for axis in left if axis not in right)

  def shaped(axes: str) -> tuple[int, ...]:
    return (*shape[:lead], *(sizes[axis] for axis in axes))

  def named(axes: str, value: jax.Array) -> Any:
    if not boxed:
      return value
    names = dict(zip(out, leaf.names[lead:])) | {'r': None}
    return leaf.replace(value=value, names=(*leaf.names[:lead], *(names[axis] for axis in axes)))

  a = jax.random.normal(key, shaped(left)) / math.sqrt(reads)
  return {'a': named(left, a), 'b': named(right, jnp.zeros(shaped(right)))}
