"""Integer mixing against MurmurHash3's published finaliser and plain Python integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import integer_hash


def mixed(x: int) -> int:
  """The finaliser in Python's integers."""
  x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
  return x ^ (x >> 16)


def test_mix_is_the_finaliser_of_murmurhash3():
  # fmix32(0) = 0 and fmix32(1) = 0x514e28b7 are those of the reference implementation.
  numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
  found = integer_hash.mix(jnp.asarray(numbers, jnp.uint32))
  assert found[:2].tolist() == [0, 0x514E28B7]
  assert found.tolist() == [mixed(x) for x in numbers]


def test_combine_folds_number_after_number():
  key = 0x9E3779B9
  for number in (3, 7):
    key = mixed(key ^ mixed((number + 0x9E3779B9) % 2**32))
  assert int(integer_hash.combine(3, 7)) == key
  assert int(integer_hash.combine(7, 3)) != key
  assert int(integer_hash.combine(3)) != int(integer_hash.combine(3, 0))


def test_combine_broadcasts_and_negative_numbers_wrap():
  found = integer_hash.combine(jnp.arange(3)[:, None], jnp.arange(2))
  assert found.shape == (3, 2)
  assert int(found[2, 1]) == int(integer_hash.combine(2, 1))
  assert int(integer_hash.combine(np.int32(-1))) == int(integer_hash.combine(np.uint32(2**32 - 1)))


@pytest.mark.parametrize(
  'key, want', [(0, 0.0), (255, 0.0), (256, 2**-24), (2**32 - 1, 1 - 2**-24)]
)
def test_uniform_is_the_upper_24_bits(key, want):
  assert float(integer_hash.uniform(jnp.uint32(key))) == want
