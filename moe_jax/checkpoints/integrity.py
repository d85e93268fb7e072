"""What proves a checkpoint whole: checksum, shape and type per array, and a CRC of the record."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from moe_jax import errors, integer_hash, trees


def checksums(tree: trees.Tree) -> dict[str, int]:
  """One 32-bit checksum per array, by path, whatever the sharding, mesh and process count."""
  return {name: checksum for name, (checksum, _) in _summaries(tree).items()}


def _summaries(tree: trees.Tree) -> dict[str, tuple[int, bool]]:
  """(checksum, whether all numbers are finite) of every array, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  # One small program per distinct array type: parameters and both moments share theirs. One after
  # the other, because sums over devices that run side by side can starve each other on the CPU.
  found = {leaf_name(path): jax.device_get(_summary(leaf)) for path, leaf in leaves}
  return {name: (int(checksum), bool(finite)) for name, (checksum, finite) in found.items()}


def compile_checksums(abstract_state: trees.Tree):
  """Compiles `_summary` once per distinct kind of array; its calls find what was compiled."""
  leaves = jax.tree.leaves(abstract_state)
  for leaf in {(leaf.shape, leaf.dtype, leaf.sharding): leaf for leaf in leaves}.values():
    _summary.lower(leaf).compile()


def require_finite(tree: trees.Tree, where: str):
  """Refuses arrays with a NaN or an infinity.

  Args:
    tree: of arrays.
    where: begins the message, 'checkpoint W/checkpoints/3'.

  Raises:
    errors.InputError: names the first such array and the place in it.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(_finite(leaf)):
      flat = int(jnp.argmin(jnp.isfinite(leaf)))
      index = [int(i) for i in np.unravel_index(flat, leaf.shape)]
      raise errors.InputError(
        f'{where} holds {float(leaf[tuple(index)])} in {leaf_name(path)} at {index} (of a stack of '
        'layers the first number is the layer, of experts the second is the expert); use an '
        'earlier step'
      )


@jax.jit
def _summary(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(`_checksum`, whether all numbers are finite) of an array."""
  finite = _finite(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)
  return _checksum(x), finite


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
  """Whether all numbers of an array are finite."""
  return jnp.isfinite(x).all()


def _checksum(x: jax.Array) -> jax.Array:
  """Sum modulo 2^32 of the bits of each element mixed with its position.

  Integer addition commutes, so any order of summation gives the same value. The mixing is
  one-to-one for a given position: a change of one element always shows, any other change but once
  in 2^32.
  """
  if x.dtype == jnp.bool_:
    bits = x.astype(jnp.uint32)
  else:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position += iota * jnp.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  mixed = integer_hash.mix(bits ^ integer_hash.mix(position + jnp.uint32(0x9E3779B9)))
  return jnp.sum(mixed, dtype=jnp.uint32)


def leaf_records(state: trees.Tree, allow_nonfinite: bool = False) -> dict[str, dict[str, Any]]:
  """`leaf_record` of every array of a state, by its path.

  Raises:
    errors.InputError: an array holds a number that is not finite, so the state is not worth saving,
      and `allow_nonfinite` is False.
  """
  summaries = _summaries(state)
  bad = [name for name, (_, finite) in summaries.items() if not finite]
  errors.require(
    allow_nonfinite or not bad,
    f'{len(bad)} arrays of the training state are not finite, first {bad[0] if bad else ""}: it is '
    'not saved, and the checkpoints before it stay; lower config.optim.peak_lr or lengthen '
    'config.optim.warmup_steps, and start from the last checkpoint with config.init_from',
  )
  return {
    leaf_name(path): leaf_record(leaf.shape, leaf.dtype, summaries[leaf_name(path)][0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def leaf_record(shape: Sequence[int], dtype: Any, checksum: int) -> dict[str, Any]:
  """What is recorded of one array."""
  return {'shape': list(shape), 'dtype': str(dtype), 'checksum': checksum}


def record(step: int, leaves: Mapping[str, Mapping[str, Any]], meta: trees.Json) -> dict[str, Any]:
  """The JSON item of a step: what the caller wants to know of it, and what proves it whole.

  Args:
    step: optimizer steps done.
    leaves: `leaf_record` of every array by its path, as in 'params/embed/embedding'.
    meta: what JSON can hold.
  """
  item = {'step': step, 'meta': {**meta, 'step': step}, 'leaves': leaves}
  item = json.loads(json.dumps(item))  # tuples become lists now, as they will on disk
  return {**item, 'crc32': crc(item)}


def crc(item: trees.Json) -> int:
  """CRC-32 of what JSON holds, whatever the order of its keys."""
  return zlib.crc32(json.dumps(item, sort_keys=True).encode())


def check_leaves(saved: trees.Json, target: trees.Tree, where: epath.Path, partial: bool):
  """Compares names, shapes and types of the checkpoint's arrays with those of the model at hand."""
  wanted = {
    leaf_name(path): (tuple(leaf.shape), str(leaf.dtype))
    for path, leaf in jax.tree_util.tree_leaves_with_path(target)
  }
  has = {name: (tuple(leaf['shape']), leaf['dtype']) for name, leaf in saved.items()}
  if _has_optimizer(wanted) and not _has_optimizer(has):
    raise errors.InputError(
      f'checkpoint {where} holds weights only, without the state of an optimizer, so no run can be '
      f'resumed from it; start one from its weights with --config.init_from={where.parent.parent} '
      'and another --workdir'
    )
  extra = [] if partial else [name for name in has if name not in wanted]
  for name in [*wanted, *extra]:
    if has.get(name) != wanted.get(name):
      raise errors.InputError(
        f'{name} is {_describe(has.get(name))} in checkpoint {where} but '
        f'{_describe(wanted.get(name))} in this configuration; use the config it was trained with '
        '(config.json beside the checkpoints), or another --workdir'
      )


def _has_optimizer(names: Iterable[str]) -> bool:
  return any(name.startswith('opt_state/') for name in names)


def _describe(leaf: tuple[tuple[int, ...], str] | None) -> str:
  return 'absent' if leaf is None else f'{leaf[1]}{list(leaf[0])}'


def leaf_name(path: tuple[Any, ...]) -> str:
  """Name of an array in the record: the same in a dict as in the state of a training run."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
