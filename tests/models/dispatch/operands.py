"""What the tests of models.dispatch share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.dispatch import DISPATCHES
from tests import tiny

T, K, E, D, F = 21, 2, 5, 12, 10  # 42 choices: no multiple of a block's height
ARGS = ('x', 'gates', 'gate_up', 'down')
# Two float32 sums in another order, of at most a few hundred terms of magnitude about 1.
CLOSE = dict(rtol=1e-4, atol=2e-5)


def operands(t=T, k=K, e=E, dtype=jnp.float32):
  """x, gates, gate_up, down, and a cotangent of the output."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  gates = jnp.asarray(rng.dirichlet(np.ones(k), size=t), jnp.float32)
  return draw(t, D), gates, draw(e, D, 2, F) / 2, draw(e, F, D) / 2, draw(t, D)


def choose(t=T, k=K, allowed=range(E), seed=0):
  """[t, k] different experts per token, out of `allowed`."""
  allowed = np.array(allowed)
  order = np.argsort(np.random.default_rng(seed).random((t, len(allowed))), axis=-1)
  return allowed[order[:, :k]].astype(np.int32)


def choose_few():
  """[T, E]: as from router expert_choice, E columns of which most are unused, some in between."""
  idx = choose(k=E)
  idx[np.random.default_rng(1).random(idx.shape) < 0.7] = E
  return idx


def padded(idx, every=3, e=E):
  """Every third token is not routed, nor the last, whose row a clipped index would reach."""
  idx = idx.copy()
  idx[::every] = idx[-1] = e
  return idx


@functools.cache
def run(name, backend='blocks', slots=None):
  """Jitted (x, gates, gate_up, down, cotangent, idx) -> (out, gradients of the four).

  `slots` is the size of the buffers, by default all tokens: an expert is chosen once by a token.
  """

  def fn(x, gates, gate_up, down, cotangent, idx):
    c = (len(x) if name == 'capacity' else 0) if slots is None else slots

    def call(*args):
      return DISPATCHES[name](*args[:2], idx, *args[2:], backend, c)

    out, vjp = jax.vjp(call, x, gates, gate_up, down)
    return out, *vjp(cotangent)

  return tiny.jit(fn)


def assert_equal_results(got, want, rtol, atol):
  for name, a, b in zip(('out', *ARGS), got, want):
    assert a.dtype == b.dtype, name
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol, atol * np.abs(b).max(), err_msg=name, strict=True)


CASES = {
  'random': choose(),
  'padded tokens': padded(choose()),
  'all padded': np.full((T, K), E, np.int32),
  'first and last expert empty': choose(allowed=(1, 2, 3)),
  'middle experts empty': choose(allowed=(0, 4)),
  'last expert empty and padded tokens': padded(choose(allowed=(0, 1, 2, 3))),
  # K different experts per token: one gets all first choices, another all second ones.
  'all tokens on the same': np.tile(np.array([3, 1], np.int32), (T, 1)),
}
