"""All dispatches against `dense`, values and all gradients, and what they may not contain."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.dispatch import operands

KERNELS = (
  *(('dropless', name) for name in ('blocks', 'ragged_dot', 'megablox_text')),
  ('capacity', ''),
  ('gather', ''),
)


@pytest.mark.parametrize('name, backend', [*KERNELS, ('dropless', 'tokamax_xla')])
@pytest.mark.parametrize('case', operands.CASES)
def test_every_dispatch_equals_dense(case, name, backend):
  args = (*operands.operands(), jnp.array(operands.CASES[case]))
  operands.assert_equal_results(
    operands.run(name, backend)(*args), operands.run('dense')(*args), **operands.CLOSE
  )


@pytest.mark.parametrize('name', ['dropless', 'capacity', 'gather'])
def test_every_dispatch_equals_dense_for_mostly_unused_columns(name):
  idx = operands.choose_few()
  args = (*operands.operands(k=operands.E), jnp.array(idx))
  got = operands.run(name)(*args)
  operands.assert_equal_results(got, operands.run('dense')(*args), **operands.CLOSE)
  d_gates = np.asarray(got[2])
  assert not d_gates[idx == operands.E].any()
  assert d_gates[idx < operands.E].all()


@pytest.mark.parametrize('name, backend', KERNELS)
def test_bfloat16_is_as_close_as_its_rounding(name, backend):
  args = operands.operands(dtype=jnp.bfloat16)
  idx = jnp.array(operands.CASES['padded tokens'])
  got = operands.run(name, backend)(*args, idx)
  wide = operands.run('dense')(*(a.astype(jnp.float32) for a in args), idx)
  dtypes = ('bfloat16', 'bfloat16', 'float32', 'bfloat16', 'bfloat16')
  for key, dtype, a, b in zip(('out', *operands.ARGS), dtypes, got, wide):
    assert a.dtype == dtype, key
    b = np.asarray(b, np.float64)
    # Some four roundings of 2^-9 in a row (h, activation, output, K-sum), of terms that cancel.
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, 0, 2**-6 * np.abs(b).max(), err_msg=key
    )


@pytest.mark.parametrize('name, backend', KERNELS)
def test_padded_tokens_get_and_give_exactly_nothing(name, backend):
  idx = operands.CASES['padded tokens']
  out, d_x, d_gates, *_ = operands.run(name, backend)(*operands.operands(), jnp.array(idx))
  off = idx[:, 0] == operands.E
  for a in (out, d_x, d_gates):
    assert not np.asarray(a)[off].any()
    assert np.asarray(a)[~off].all()


@pytest.mark.parametrize('poisoned', ['activations', 'cotangents'])
@pytest.mark.parametrize('name, backend', [*KERNELS, ('dense', 'blocks')])
def test_nan_in_padded_tokens_stays_there(name, backend, poisoned):
  x, gates, gate_up, down, cotangent = operands.operands()
  idx = operands.CASES['padded tokens']
  off = idx[:, 0] == operands.E
  clean = operands.run(name, backend)(x, gates, gate_up, down, cotangent, jnp.array(idx))

  def poison(a):
    return a.at[np.nonzero(off)].set(jnp.nan)

  x, cotangent = (poison(x), cotangent) if poisoned == 'activations' else (x, poison(cotangent))
  got = operands.run(name, backend)(x, gates, gate_up, down, cotangent, jnp.array(idx))
  for key, a, b in zip(('out', *operands.ARGS), got, clean):
    a, b = np.asarray(a), np.asarray(b)
    if len(a) == operands.T:
      a, b = a[~off], b[~off]
    np.testing.assert_array_equal(a, b, err_msg=key)
