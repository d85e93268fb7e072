"""Divisions of the vocabulary: hashes that never change, halves, and two ways to the border."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.watermark import partition

V = 50
BALANCE = partition.Scheme('balance', key=0x123456789ABCDEF0, window=3)
VANILLA = partition.Scheme('vanilla', key=7, window=3)


def drawn_probs(rows=1, seed=0):
  return jax.nn.softmax(jnp.asarray(np.random.default_rng(seed).normal(size=(rows, V)) * 2))


def by_sorting(order, mass):
  """The reference: sort, add up, and every token from the middle of the mass on is available."""
  order, mass = np.asarray(order), np.asarray(mass).astype(np.int64)
  found = np.zeros(len(order), bool)
  by_order = np.argsort(order, kind='stable')
  found[by_order] = 2 * np.cumsum(mass[by_order]) >= mass.sum()
  return found


def test_available_tokens_are_those_of_a_sorted_sum_and_hits_say_the_same():
  probs = drawn_probs()[0]
  seed = partition.prefix_seed(BALANCE, BALANCE.secret, jnp.array([5, 6, 7]))
  divisions = jnp.arange(BALANCE.partitions)
  available = partition.available(
    BALANCE, jnp.broadcast_to(seed, divisions.shape), divisions, jnp.broadcast_to(probs, (100, V))
  )
  order = partition.places(seed, divisions, V)
  for row in range(100):
    assert (available[row] == by_sorting(order[row], partition.masses(probs))).all()
  hits = jax.vmap(lambda token: partition.hits(BALANCE, seed, token, probs))(jnp.arange(V))
  assert (hits == available.T).all()
  plain = partition.available(VANILLA, jnp.broadcast_to(seed, divisions.shape), divisions, V)
  hits = jax.vmap(lambda token: partition.hits(VANILLA, seed, token, V))(jnp.arange(V))
  assert (hits == plain.T).all()


def test_either_part_has_half_of_the_mass():
  probs = drawn_probs(400)
  seeds = partition.prefix_seed(BALANCE, BALANCE.secret, jnp.arange(1200).reshape(400, 3))
  found = partition.available(BALANCE, seeds, seeds % 100, probs)
  share = jnp.where(found, probs, 0).sum(axis=-1)
  # At least half by definition, and at most the mass of the token at the border more.
  assert float(share.min()) >= 0.5 - 1e-6
  assert (share <= 0.5 + probs.max(axis=-1) + 1e-6).all()
  even = partition.available(VANILLA, seeds, seeds % 100, V)
  assert float(even.mean()) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(400 * V))


def test_a_certain_token_is_always_available():
  probs = jnp.full((V,), 0.4 / (V - 1)).at[9].set(0.6)
  hits = partition.hits(BALANCE, jnp.uint32(3), jnp.int32(9), probs)
  assert bool(hits.all())


def test_hashes_are_those_of_the_first_version():
  # Text that was written once must be readable for ever: another hash is another name in MIXING.
  seed = partition.prefix_seed(BALANCE, BALANCE.secret, jnp.array([1, 2, 3]))
  assert partition.MIXING == 'murmur3-fmix32-combine/1'
  assert int(seed) == 1746789105
  assert partition.division_of(BALANCE, seed, jnp.arange(4)).tolist() == [49, 72, 55, 6]
  assert partition.places(seed, jnp.int32(42), 3).tolist() == [2043625861, 3860642010, 2310251778]


def test_divisions_depend_on_key_message_and_the_tokens_before():
  before = jnp.array([1, 2, 3])
  seeds = {
    int(partition.prefix_seed(VANILLA, partition.Scheme('vanilla', key).secret, before))
    for key in (0, 1, 1 << 32, (1 << 32) + 1)
  }
  assert len(seeds) == 4
  two = partition.Scheme('vanilla', 0, prefix=2)
  assert partition.prefix_seed(two, two.secret, before) != partition.prefix_seed(
    two, two.secret, jnp.array([1, 4, 3])
  )
  one = partition.Scheme('vanilla', 0)
  assert partition.prefix_seed(one, one.secret, before) == partition.prefix_seed(
    one, one.secret, jnp.array([9, 9, 3])
  )
  divisions = np.asarray(partition.division_of(one, jnp.uint32(5), jnp.arange(20_000)))
  counts = np.bincount(divisions, minlength=100)
  assert len(counts) == 100
  # Chi-square with 99 degrees of freedom: mean 99, deviation 14.
  assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * 14


def test_messages_are_cut_into_chunks_and_put_together():
  scheme = partition.Scheme('vanilla', 0, message_bits=50, chunk_bits=20, tokens_per_bit=2.5)
  assert (scheme.num_chunks, scheme.chunk_tokens, scheme.num_tokens) == (3, 50, 160)
  assert scheme.chunks((1 << 40) + (2 << 20) + 3) == (1, 2, 3)
  assert scheme.message(scheme.chunks(2**50 - 1)) == 2**50 - 1
  assert [scheme.bits_of(n) for n in range(3)] == [10, 20, 20]
  for bits, first in ((8, 8), (20, 20), (40, 20), (41, 1)):
    assert partition.Scheme('vanilla', 0, message_bits=bits).bits_of(0) == first
  for message in (-1, 2**50):
    with pytest.raises(errors.InputError, match=r'below 2\^50: message_bits=50; take a smaller'):
      scheme.chunks(message)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'kind': 'balanced'}, "kind='balanced' must be one of balance, vanilla"),
    ({'key': 2**64}, 'below 2'),
    ({'chunk_bits': 21}, 'chunk_bits=21 must be 1 to 20'),
    ({'message_bits': 0}, 'message_bits=0 must be at least 1'),
    ({'chunk_bits': 1, 'tokens_per_bit': 0.5}, 'at least a token per chunk: 1/1 with chunk_bits=1'),
    ({'tokens_per_bit': float('inf')}, 'tokens_per_bit=inf must be finite'),
    ({'tokens_per_bit': float('nan')}, 'tokens_per_bit=nan must be finite'),
    ({'tokens_per_bit': 1e308}, r'tokens_per_bit=1e\+308 must be finite'),  # times 20 is not
    ({'partitions': 1}, 'partitions=1 must be 2 to'),
    ({'window': 0}, 'window=0 must be at least 1'),
    ({'prefix': 11}, 'prefix=11 must be 1 to window=10'),
  ],
)
def test_values_out_of_range(changes, words):
  with pytest.raises(errors.InputError, match=words):
    partition.Scheme(**{'kind': 'vanilla', 'key': 0} | changes)
