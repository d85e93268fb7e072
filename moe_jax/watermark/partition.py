"""Which half of the vocabulary a message makes likelier at a place of a text.

Codable watermarks (arXiv 2307.15992): at every place a message has an available and an unavailable
part of the vocabulary. Messages are folded into `partitions` such divisions per place, so that a
decoder looks at [places, partitions] and not at [places, messages].

Tokens are ordered by a hash of (key, tokens before, division), and available from a threshold on:

  vanilla   half of all hashes: every token with probability 1/2
  balance   where the tokens below hold half of the mass that a small model, the proxy, gives: the
            available part is about as probable as the other, and places without choice are left
            nearly alone

Masses are whole numbers below 2^24 in float32, so that sums are exact in every order and shape.

Axis letters: W tokens before, Z divisions.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, integer_hash

Array = jax.Array

KINDS = ('balance', 'vanilla')
# Name and version of the hash: part of every key file. Another hash is another name.
MIXING = 'murmur3-fmix32-combine/1'
MASS = 1 << 23  # of a whole distribution, about
_MESSAGE, _DIVISION = 1, 2  # what a hash is for
_MAX_BITS = 20


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How messages are written into text: what writer and reader must agree on, but for the proxy."""

  kind: str  # one of KINDS
  key: int  # secret, below 2^64
  message_bits: int = 20  # of a whole message
  chunk_bits: int = 20  # of a message, written together; the rest of a message follows behind
  tokens_per_bit: float = 10.0
  partitions: int = 100
  window: int = 10  # tokens that the proxy reads; the first `window` of a text carry nothing
  prefix: int = 1  # last tokens that decide the divisions

  def __post_init__(self):
    """Raises errors.InputError for a value out of its range."""
    rules = (
      ('kind', self.kind in KINDS, f'one of {", ".join(KINDS)}'),
      ('key', 0 <= self.key < 2**64, 'at least 0 and below 2^64'),
      ('chunk_bits', 1 <= self.chunk_bits <= _MAX_BITS, f'1 to {_MAX_BITS}'),
      ('message_bits', self.message_bits >= 1, 'at least 1'),
      (
        'tokens_per_bit',
        1 <= self.chunk_bits * self.tokens_per_bit < math.inf,
        f'finite and at least a token per chunk: 1/{self.chunk_bits} with chunk_bits='
        f'{self.chunk_bits}',
      ),
      ('partitions', 2 <= self.partitions <= 2**16, '2 to 65536'),
      ('window', self.window >= 1, 'at least 1'),
      ('prefix', 1 <= self.prefix <= self.window, f'1 to window={self.window}'),
    )
    for name, holds, rule in rules:
      errors.require(holds, f'watermark {name}={getattr(self, name)!r} must be {rule}')

  @property
  def secret(self) -> np.ndarray:
    """The key as [2] uint32, which programs take as an argument: one serves all keys."""
    return np.array([self.key & 0xFFFFFFFF, self.key >> 32], np.uint32)

  @property
  def divisions(self) -> 'Scheme':
    """What programs about divisions are compiled by: without key, sizes of messages and rate."""
    rest = {'key': 0, 'message_bits': 1, 'chunk_bits': 1, 'tokens_per_bit': 1.0}
    return dataclasses.replace(self, **rest)

  @property
  def chunk_tokens(self) -> int:
    """Tokens that carry one chunk."""
    return int(self.chunk_bits * self.tokens_per_bit)

  @property
  def num_chunks(self) -> int:
    """Chunks of a message."""
    return -(-self.message_bits // self.chunk_bits)

  def bits_of(self, number: int) -> int:
    """Bits of the chunk of that number: the first has what the others leave over."""
    first = self.message_bits - (self.num_chunks - 1) * self.chunk_bits
    return self.chunk_bits if number else first

  @property
  def num_tokens(self) -> int:
    """Tokens of a text that carries a whole message."""
    return self.window + self.num_chunks * self.chunk_tokens

  def chunks(self, message: int) -> tuple[int, ...]:
    """The chunks of a message, first those of its highest bits.

    Raises:
      errors.InputError: the message has more bits than the scheme.
    """
    errors.require(
      0 <= message < 2**self.message_bits,
      f'the message {message} must be at least 0 and below 2^{self.message_bits}: '
      f'message_bits={self.message_bits}; take a smaller one, or a key with more bits',
    )
    shifts = range(self.num_chunks - 1, -1, -1)
    return tuple(message >> n * self.chunk_bits & (1 << self.chunk_bits) - 1 for n in shifts)

  def message(self, chunks: Sequence[int]) -> int:
    """The inverse of `chunks`."""
    found = 0
    for chunk in chunks:
      found = found << self.chunk_bits | chunk
    return found


def prefix_seed(scheme: Scheme, secret: Array | np.ndarray, before: Array) -> Array:
  """Hash of key and last tokens before a place: `Scheme.secret`, ids [..., W] -> [...] uint32."""
  tokens = [before[..., -i] for i in range(1, scheme.prefix + 1)]
  return integer_hash.combine(secret[0], secret[1], *tokens)


def division_of(scheme: Scheme, seed: Array, message: Array) -> Array:
  """Which division a message has: uint32 of `prefix_seed`, chunks of messages -> int32 below Z."""
  mixed = integer_hash.combine(seed, _MESSAGE, message)
  return (mixed % jnp.uint32(scheme.partitions)).astype(jnp.int32)


def places(seed: Array, division: Array, vocab_size: int) -> Array:
  """The order of the vocabulary: seed [...], division [...] -> [..., V] uint32, all different."""
  own = integer_hash.combine(seed, _DIVISION, division)
  # One step of `combine`, which is one-to-one in the token.
  return integer_hash.combine(own[..., None], jnp.arange(vocab_size))


def masses(probs: Array) -> Array:
  """Probabilities [..., V] float32 -> whole numbers, float32."""
  return jnp.round(probs * MASS)


def threshold(order: Array, mass: Array) -> Array:
  """The first place at which the mass up to and with it is half of all.

  Found bit by bit: 32 sums, where a sort of the vocabulary would cost more.

  Args:
    order: [..., V] uint32, see `places`.
    mass: [..., V] float32, see `masses`.

  Returns:
    [...] uint32, to be compared with `order`.
  """
  total = mass.sum(axis=-1)

  def refine(bit: Array, low: Array) -> Array:
    middle = low | jnp.uint32(1) << (jnp.uint32(31) - bit.astype(jnp.uint32))
    below = jnp.where(order < middle[..., None], mass, 0).sum(axis=-1)
    return jnp.where(2 * below < total, middle, low)

  return jax.lax.fori_loop(0, 32, refine, jnp.zeros(total.shape, jnp.uint32))


def available(scheme: Scheme, seed: Array, division: Array, probs: Array | int) -> Array:
  """Which tokens a division makes likelier.

  Args:
    scheme: see `Scheme`.
    seed: [...] uint32.
    division: [...] int32.
    probs: [..., V] float32 of the proxy; V for a scheme without.

  Returns:
    [..., V] bool.
  """
  if isinstance(probs, int):
    return places(seed, division, probs) >= jnp.uint32(1 << 31)
  order = places(seed, division, probs.shape[-1])
  return order >= threshold(order, masses(probs))[..., None]


def hits(scheme: Scheme, seed: Array, token: Array, probs: Array | int) -> Array:
  """In which of all divisions a token is available.

  The token's own mass counts as below it: one with more than half is available in all of them.

  Args:
    scheme: see `Scheme`.
    seed: [] uint32.
    token: [] int32.
    probs: [V] of the proxy; V for a scheme without.

  Returns:
    [Z] bool.
  """
  divisions = jnp.arange(scheme.partitions)
  own = integer_hash.combine(integer_hash.combine(seed, _DIVISION, divisions), token)
  if isinstance(probs, int):
    return own >= jnp.uint32(1 << 31)
  mass = masses(probs)
  upto = places(seed, divisions, len(probs)) <= own[:, None]
  # A product, which is many times as fast as sums of chosen numbers, and here as exact.
  product = jnp.matmul(upto.astype(jnp.float32), mass, precision=jax.lax.Precision.HIGHEST)
  return 2 * product >= mass.sum()
