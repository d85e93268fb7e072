"""Grouped products, three legs each, against a loop over experts in numpy.

tokamax runs through its XLA implementation: its GPU kernels do not run on a CPU.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from moe_jax.models.experts import grouped_kernels

A, B = 6, 5
BACKENDS = {
  'ragged_dot': grouped_kernels.ragged_dot_products,
  'tokamax': lambda: grouped_kernels.tokamax_products(('xla',), ('xla',)),
}
SIZES = {
  'first and last empty': (0, 3, 1, 0),
  'two in the middle empty': (2, 0, 0, 2),
  'all on one': (0, 0, 4, 0),
  'even': (1, 1, 1, 1),
}  # times 8 rows; all sum to 4
# Both round inputs and outputs alike, so what is left is the output's rounding, half a unit of the
# dtype's epsilon, and the order of float32 sums of up to 256 terms.
RTOL = {'float32': 2e-5, 'bfloat16': 2**-8}
ATOL = {'float32': 2e-5, 'bfloat16': 2**-7}


def numpy_legs(x, g, w, sizes):
  gmm, gmm_t = np.zeros((len(x), B)), np.zeros((len(x), A))
  tgmm = np.zeros((len(sizes), A, B))
  start = 0
  for expert, size in enumerate(sizes):
    rows = slice(start, start + size)
    gmm[rows] = x[rows] @ w[expert]
    gmm_t[rows] = g[rows] @ w[expert].T
    tgmm[expert] = x[rows].T @ g[rows]
    start += size
  return gmm, gmm_t, tgmm


def operands(rows, num_experts, dtype):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  return draw(rows, A), draw(rows, B), draw(num_experts, A, B)


@pytest.fixture(scope='module')
def legs():
  """name -> jitted (x, g, w, sizes) -> the three legs; one compile per dtype."""
  made = {}
  for name, make in BACKENDS.items():
    backend = make()
    assert backend.name == name

    def run(x, g, w, n, b=backend):
      return (b.gmm(x, w, n), b.gmm_t(g, w, n), b.tgmm(x, g, n))

    made[name] = jax.jit(run)
  return made


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('groups', SIZES)
@pytest.mark.parametrize('name', BACKENDS)
def test_legs_equal_a_loop_over_experts(legs, name, groups, dtype):
  sizes = np.array(SIZES[groups], np.int32) * 8
  x, g, w = operands(32, 4, dtype)
  got = legs[name](x, g, w, jnp.array(sizes))
  want = numpy_legs(*(np.asarray(a, np.float64) for a in (x, g, w)), sizes)
  for leg, a, b in zip(('gmm', 'gmm_t', 'tgmm'), got, want):
    assert a.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(a, np.float64),
      b,
      RTOL[dtype],
      ATOL[dtype] * np.abs(b).max(),
      err_msg=leg,
      strict=True,
    )
  assert not np.asarray(got[2])[sizes == 0].any()  # exactly 0, not small


@pytest.mark.parametrize('name', BACKENDS)
def test_groups_need_no_alignment(legs, name):
  sizes = np.array([5, 0, 1, 26], np.int32)
  x, g, w = operands(32, 4, 'float32')
  got = legs[name](x, g, w, jnp.array(sizes))
  want = numpy_legs(*(np.asarray(a, np.float64) for a in (x, g, w)), sizes)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, 2e-5, 2e-5)


def test_tokamax_works_outside_of_an_absl_command(monkeypatch):
  """In a notebook or under pytest: flags not parsed, and a command line that is not ours."""
  monkeypatch.setattr(sys, 'argv', ['ipykernel', '-f', 'kernel.json'])
  x, _, w = operands(32, 4, 'float32')
  flags.FLAGS.unparse_flags()
  backend = grouped_kernels.tokamax_products(('xla',), ('xla',))
  jax.eval_shape(backend.gmm, x, w, jnp.full(4, 8, jnp.int32))
