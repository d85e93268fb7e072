import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.attention.kernels import (
  chunked,
  reference,
  splash,
  tokamax,
)
from tests import tiny
from tests.models.attention.kernels import operands


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Several blocks per row, so that there are some before, on and after the diagonal."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunked, 'BLOCK', 32)
    patch.setattr(splash, 'BLOCKS', (splash.LANES,))
    yield


# chunked


def temporary_bytes(fn, length):
  def shape(*s, t=jnp.float32):
    return jax.ShapeDtypeStruct((1, length, *s), t)

  ids = shape(t=jnp.int32)
  program = tiny.jit(functools.partial(fn, scale=1.0))
  compiled = program.lower(*[shape(2, 16)] * 3, ids, ids).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def gradients_of(attend_fn):
  def run(q, k, v, positions, segment_ids, scale):
    def fn(q, k, v):
      return (attend_fn(q, k, v, positions, segment_ids, scale) ** 2).sum()

    return jax.grad(fn, argnums=(0, 1, 2))(q, k, v)

  return run


@pytest.mark.parametrize('wrap', [lambda fn: fn, gradients_of], ids=['forward', 'backward'])
def test_memory_of_chunked_is_linear_in_the_length(wrap):
  """Four times the length: 16 times the scores of `reference`, at most 4 times of `chunked`."""
  linear = [temporary_bytes(wrap(chunked.attend), length) for length in (512, 2048)]
  square = [temporary_bytes(wrap(reference.attend), length) for length in (512, 2048)]
  assert square[1] > 12 * square[0]
  assert linear[1] < 4.4 * linear[0]
  assert linear[1] < square[1] / 10


def test_chunked_skips_blocks_before_the_first_document(monkeypatch):
  monkeypatch.setattr(chunked, 'BLOCK', 4)
  a = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 0]  # document 2 starts in block 1
  b = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0, 0]  # block 2 still sees document 1

  def blocks(*rows, length=14, first=0):
    rows = chunked._rows(jnp.array(rows), length, first, block=4)
    return list(zip(rows.first.tolist(), rows.end.tolist()))

  assert blocks(a) == [(0, 1), (0, 2), (1, 3), (1, 4)]
  assert blocks(b) == [(0, 1), (0, 2), (0, 3), (3, 4)]
  assert blocks(a, b) == [(0, 1), (0, 2), (0, 3), (1, 4)]  # what some row needs
  # The second half, tokens 7 to 13, in blocks 7-10 and 11-13.
  assert blocks(a, length=7, first=7) == [(1, 3), (1, 4)]


def test_a_remat_policy_that_saves_chunked_outputs_spares_the_second_forward():
  arrays, rows = operands.operands(operands.SHAPES['MHA'])[:3], operands.batch()

  def loops(*saved):
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    fn = jax.checkpoint(lambda *a: jnp.tanh(chunked.attend(*a, *rows, 0.5)), policy=policy)
    program = jax.make_jaxpr(jax.grad(lambda *a: jnp.sin(fn(*a)).sum()))(*arrays)
    return sum(eqn.primitive.name == 'while' for eqn in tiny.equations(program))

  assert loops('attn_out') == loops() - 1


def test_document_starts_by_hand():
  ids = jnp.array([[3, 3, 5, 5, 5, 0, 0], [1, 2, 2, 2, 2, 2, 2]])
  np.testing.assert_array_equal(
    tokamax.document_starts(ids), [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
  )
