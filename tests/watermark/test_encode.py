"""The processor: which logits it lowers, in which rows and places, and through a real generator."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.inference import generate, processors, sampling
from moe_jax.watermark import decode, encode, partition, proxy
from tests import tiny
from tests.watermark import writing

V = writing.V
MESSAGES = [3, 200]


@functools.partial(tiny.jit, static_argnums=0)
def lowered(scheme, delta, ids, count):
  """[B, V]: what the processor takes from logits at one place."""
  made = encode.processor(scheme, writing.known(scheme.kind), MESSAGES, 0.0)
  chunks, size, secret, _, weights = made.constants
  logits = jnp.ones((2, V))
  constants = (chunks, size, secret, delta, weights)
  after, state = made.function(constants, logits, processors.Written(ids, count), ())
  assert state == ()
  return logits - after


@functools.partial(tiny.jit, static_argnums=0)
def available(scheme, before, message):
  """[V] bool, from the parts."""
  probs = V
  if scheme.kind == 'balance':
    cfg, weights = writing.known(scheme.kind)
    probs = proxy.next_probs(cfg, weights, before[None])[0]
  seed = partition.prefix_seed(scheme, scheme.secret, before)
  return partition.available(scheme, seed, partition.division_of(scheme, seed, message), probs)


@pytest.mark.parametrize('kind', partition.KINDS)
def test_unavailable_tokens_lose_delta_and_others_nothing(kind):
  scheme = partition.Scheme(kind, 5, message_bits=16, chunk_bits=8, tokens_per_bit=2.5, window=3)
  ids = np.full((2, 60), -1, np.int32)
  ids[:, :50] = np.random.default_rng(0).integers(V, size=(2, 50))
  for count, chunk in ((3, 0), (22, 0), (23, 1), (42, 1)):
    found = np.asarray(lowered(scheme, 1.5, ids, count))
    for row, message in enumerate(MESSAGES):
      part = np.uint32(scheme.chunks(message)[chunk])
      want = np.where(available(scheme, ids[row, count - 3 : count], part), 0, 1.5)
      assert (found[row] == want).all() and 0 < want.sum() < 1.5 * V
  for count in (0, 2, 43, 49):  # no context yet; the message is over
    assert not np.asarray(lowered(scheme, 1.5, ids, count)).any()
  assert not np.asarray(lowered(scheme, 0.0, ids, 10)).any()


@pytest.fixture(scope='module')
def generator():
  cfg = dataclasses.replace(writing.CFG, max_seq_len=128)
  return generate.Generator(cfg, {'params': tiny.params(cfg)}, (1,))


@pytest.mark.parametrize('kind', partition.KINDS)
def test_generated_rows_carry_their_own_messages(generator, kind):
  scheme = writing.SCHEMES[kind]
  made = encode.processor(scheme, writing.known(kind), MESSAGES, 60.0)
  whole = processors.forbid_before(scheme.num_tokens, (1,))
  prompts, how = [[7, 2], [20, 3, 9]], sampling.Sampling(temperature=1.0, seed=3)
  found = generator.generate(prompts, scheme.num_tokens, how, processors=[made, whole])
  for row, message in zip(found.tokens, MESSAGES):
    (chunk,) = decode.read_all(scheme, decode.look(scheme, writing.known(kind), row, V))
    # The tiny model's logits are far apart, and a certain token is not moved.
    assert chunk.value == message and chunk.p_value < 1e-3


def test_bad_input():
  vanilla, balance = writing.SCHEMES['vanilla'], writing.SCHEMES['balance']
  with pytest.raises(errors.InputError, match='message_bits=8; take a smaller one'):
    encode.processor(vanilla, None, [256], 1.0)
  with pytest.raises(errors.InputError, match='--delta=-1 must be at least 0'):
    encode.processor(vanilla, None, [1], -1)
  with pytest.raises(errors.InputError, match="a 'vanilla' watermark has no proxy"):
    encode.processor(vanilla, writing.known('balance'), [1], 1.0)
  with pytest.raises(errors.InputError, match="a 'balance' watermark needs a proxy"):
    encode.processor(balance, None, [1], 1.0)
  encode.check_length(vanilla, 43)
  with pytest.raises(errors.InputError, match=r'needs 43 tokens \(3 \+ 1 chunks of 40\), but'):
    encode.check_length(vanilla, 42)
