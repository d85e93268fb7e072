"""Every implementation against attention and its gradients written out in float64 numpy.

`splash` runs in Pallas' interpreter here, and compiles for chips that are not there in a slow test.
`tokamax` runs through its XLA forms; its kernels compile for a GPU in
tests/planning/test_compile_ahead_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.attention.kernels import (
  chunked,
  reference,
  short,
  splash,
)
from tests import tiny
from tests.models.attention.kernels import operands


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Several blocks per row, so that there are some before, on and after the diagonal."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunked, 'BLOCK', 32)
    patch.setattr(short, 'BLOCK', 48)  # 150 is no multiple
    patch.setattr(splash, 'BLOCKS', (splash.LANES,))
    yield


@pytest.mark.parametrize('kind', operands.SHAPES)
@pytest.mark.parametrize('name', operands.ATTENDS)
def test_outputs_and_gradients_are_those_of_the_formula(name, kind):
  shape, (positions, ids) = operands.SHAPES[kind], operands.batch()
  arrays = operands.operands(shape)
  out, grads = operands.compiled(name, shape.scale)(*arrays, positions, ids)
  want, want_grads = operands.written_out(*arrays, ids, shape.scale)
  real = np.asarray(ids) > 0
  assert out.shape == (len(operands.LENGTHS), operands.L, shape.heads, shape.v_head_dim)
  np.testing.assert_allclose(np.asarray(out)[real], want[real], **operands.CLOSE)
  assert np.isfinite(out).all()  # padding too
  for got, wanted in zip(grads, want_grads):
    np.testing.assert_allclose(got, wanted, **operands.CLOSE)
    assert not np.asarray(got)[~real].any()  # nothing comes from padding, nothing goes to it


@pytest.mark.parametrize('name', operands.ATTENDS)
def test_bfloat16(name):
  """Probabilities and score gradients are rounded to bfloat16: 2^-8 each, a few of them in a row.

  Sums of rounded terms cancel, so errors are held against the largest magnitude of an array.
  """
  shape, (positions, ids) = operands.SHAPES['GQA'], operands.batch()
  arrays = operands.operands(shape, 'bfloat16')
  out, grads = operands.compiled(name, shape.scale)(*arrays, positions, ids)
  assert {out.dtype, *(g.dtype for g in grads)} == {jnp.dtype('bfloat16')}
  want, want_grads = operands.written_out(*arrays, ids, shape.scale)
  out = jnp.where(ids[..., None, None] > 0, out, 0)
  for got, wanted in zip((out, *grads), (want, *want_grads)):
    error = np.abs(np.asarray(got, np.float64) - wanted).max()
    assert error < 2**-6 * np.abs(wanted).max()


@pytest.mark.parametrize('name', operands.ATTENDS)
def test_documents_do_not_leak(name):
  """Another document leaves every bit of the others, and of their gradients, as it was."""
  shape, (positions, ids) = operands.SHAPES['GQA'], operands.batch()
  run = operands.compiled(name, shape.scale)
  before, other = operands.operands(shape), operands.operands(shape, seed=1)
  touched = np.asarray(ids) == 2

  def where(a, b):
    return jnp.where(touched[..., None, None], b, a)

  after = [where(a, b) for a, b in zip(before, other)]
  (out, grads), (new_out, new_grads) = (run(*a, positions, ids) for a in (before, after))
  rest = (np.asarray(ids) > 0) & ~touched
  for a, b in zip((out, *grads), (new_out, *new_grads)):
    np.testing.assert_array_equal(np.asarray(a)[rest], np.asarray(b)[rest])
    assert (np.asarray(a)[touched] != np.asarray(b)[touched]).any()


def test_the_mask_of_a_cache_by_hand():
  """One query of position 1 and three slots: its own document's slots 0 and 1, of values 1 and 3.

  Equal keys weigh the same, so that it gets (1 + 3) / 2; a query that sees nothing the mean of all.
  """

  def of(*ids):
    return jnp.array([ids])

  mask = reference.visible(of(1), of(7), of(0, 1, 2), of(7, 7, 7))
  np.testing.assert_array_equal(mask, [[[True, True, False]]])
  assert not reference.visible(of(5), of(0), of(0, 1, 2), of(0, 7, 7)).any()
  k, v = jnp.ones((1, 3, 1, 2)), jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
  q = jnp.ones((1, 1, 2, 2))
  masked = tiny.jit(functools.partial(reference.masked, scale=0.5))
  for seen, want in ((mask, 2), (jnp.zeros_like(mask), 4)):
    np.testing.assert_allclose(masked(q, k, v, seen)[0, 0, :, 0], [want] * 2, rtol=1e-6)


@pytest.mark.parametrize('name', ['reference', 'short', 'chunked', 'dot_product'])
def test_softmax_is_in_float32(name):
  arrays = operands.operands(operands.SHAPES['GQA'], 'bfloat16')[:3]
  program = jax.make_jaxpr(functools.partial(operands.ATTENDS[name], scale=0.5))(
    *arrays, *operands.batch()
  )
  exps = [eqn for eqn in tiny.equations(program) if eqn.primitive.name == 'exp']
  assert exps and all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in exps)


@pytest.mark.parametrize('name', operands.ATTENDS)
def test_outputs_carry_the_name_that_remat_policies_save(name):
  program = jax.make_jaxpr(functools.partial(operands.ATTENDS[name], scale=0.5))(
    *operands.operands(operands.SHAPES['MHA'])[:3], *operands.batch()
  )
  names = {e.params['name'] for e in tiny.equations(program) if e.primitive.name == 'name'}
  assert names == {'attn_out'}
