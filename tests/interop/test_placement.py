"""Leaves that are filled in place on the devices, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop import mapping, placement
from tests import tiny


@pytest.mark.parametrize(
  'index, starts, sizes',
  [
    ((), [0, 0, 0], [4, 5, 6]),
    ((2,), [2, 0, 0], [1, 5, 6]),
    ((2, slice(None), 3), [2, 0, 3], [1, 5, 1]),
    ((slice(1, 3), slice(4, 9)), [1, 4, 0], [2, 1, 6]),
  ],
)
def test_window(index, starts, sizes):
  assert placement.window(index, (4, 5, 6)) == (starts, sizes)


def entry(leaf, index, shape):
  return mapping.Entry('name', shape, 0, shape, leaf, index, shape, transposed=False)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_parts_arrive_where_they_belong_and_as_they_are(dtype):
  """Bit by bit, not-a-numbers included, on every device."""
  sharding = jax.NamedSharding(tiny.mesh(data=2, expert=4), jax.P('expert'))
  abstract = {'a': jax.ShapeDtypeStruct((4, 3, 2), dtype, sharding=sharding)}
  rng = np.random.default_rng(0)
  kind = np.dtype(dtype)
  want = rng.integers(2 ** (8 * kind.itemsize), size=(4, 3, 2), dtype=f'u{kind.itemsize}')
  leaves = placement.Leaves(abstract)
  for i in range(4):
    for j in (1, 0):
      leaves.write(entry('a', (i, slice(None), j), (3,)), want[i, :, j].view(dtype))
  (found,) = leaves.finish().values()
  assert found.dtype == dtype and found.sharding == sharding
  np.testing.assert_array_equal(np.asarray(found).view(want.dtype), want)


def test_a_part_is_written_in_place():
  """Otherwise every tensor of a large model would move all of its stack."""
  abstract = {'a': jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16)}
  leaves = placement.Leaves(abstract)
  places = set()
  for i in range(8):
    leaves.write(entry('a', (i,), (1024,)), np.full(1024, i, jnp.bfloat16))
    places.add(leaves._bits['a'].unsafe_buffer_pointer())
  (found,) = leaves.finish().values()
  assert places == {found.unsafe_buffer_pointer()}
