"""Arrays that are filled part by part on the devices, with host memory for one part."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import mapping

Array = jax.Array


class Leaves:
  """The leaves of a model, each allocated on its devices at its first part.

  They are kept as unsigned integers until all parts are there: a slice of bits is written in place,
  where one of bfloat16 makes XLA's CPU backend convert the whole array.
  """

  def __init__(self, abstract: Mapping[str, jax.ShapeDtypeStruct]):
    """Takes shape, dtype and, if it has one, sharding of every leaf by name."""
    self._abstract, self._bits = dict(abstract), {}

  def write(self, entry: mapping.Entry, part: np.ndarray):
    """Puts `part` where `entry` says: leaf[entry.index] = part."""
    leaf = self._abstract[entry.leaf]
    bits = np.dtype(f'u{leaf.dtype.itemsize}')
    if entry.leaf not in self._bits:
      self._bits[entry.leaf] = _zeros(leaf.shape, bits, leaf.sharding)()
    starts, sizes = window(entry.index, leaf.shape)
    values = np.ascontiguousarray(part).view(bits).reshape(sizes)
    self._bits[entry.leaf] = _put(self._bits[entry.leaf], values, np.array(starts, np.int32))

  def finish(self) -> dict[str, Array]:
    """The leaves by name; the object is empty then."""
    found = {}
    for name, leaf in self._abstract.items():
      found[name] = _as_type(self._bits.pop(name), dtype=leaf.dtype)
    return found


def window(index: tuple[int | slice, ...], shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
  """Where array[index] begins and how large it is along every axis of an array of `shape`."""
  whole = (slice(None),) * (len(shape) - len(index))
  starts, sizes = [], []
  for at, size in zip((*index, *whole), shape):
    start, stop, _ = (slice(at, at + 1) if isinstance(at, int) else at).indices(size)
    starts.append(start)
    sizes.append(stop - start)
  return starts, sizes


def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Any:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf: Array, part: Array, start: Array) -> Array:
  return jax.lax.dynamic_update_slice(leaf, part, [start[i] for i in range(leaf.ndim)])


@functools.partial(jax.jit, donate_argnums=0, static_argnames='dtype')
def _as_type(bits: Array, *, dtype: np.dtype) -> Array:
  return jax.lax.bitcast_convert_type(bits, dtype)
