"""Experts with int8 and float8 products, against a reference that rounds straight through."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from moe_jax import errors
from moe_jax.config import moe_config, parse
from moe_jax.models import layers
from moe_jax.models.dispatch import DISPATCHES, dropless
from moe_jax.models.experts import backends, grouped_kernels, grouped_products, low_precision
from moe_jax.runs import run_record
from moe_jax.training import objective, optimizer_step, train_state
from tests import tiny

T, K, E, D, F = 37, 2, 5, 24, 10
QTYPES = moe_config.LOW_PRECISION
# Of the layer's output against full precision: relative error in the mean square.
ERROR = {'int8': 0.03, 'float8_e4m3fn': 0.1}
CHOICES = {
  'spread': lambda rng: np.argsort(rng.random((T, E)), axis=1)[:, :K],
  'all on one': lambda rng: np.tile([[2, E]], (T, 1)),
  'some empty': lambda rng: rng.permuted(np.tile([0, 3], (T, 1)), axis=1),
  'padding': lambda rng: np.where(
    np.arange(T)[:, None] % 3 == 0, E, np.argsort(rng.random((T, E)), axis=1)[:, :K]
  ),
}


@pytest.fixture(scope='module', autouse=True)
def legs_on_cpu():
  """What a TPU runs, with XLA's products for all three legs."""
  for qtype in QTYPES:

    def make(qtype=qtype):
      products = grouped_kernels.ragged_dot_products()
      return grouped_products.GroupedExperts(low_precision.rounded_products(products, qtype))

    backends.BACKENDS[f'legs {qtype}'] = make
  yield
  for qtype in QTYPES:
    del backends.BACKENDS[f'legs {qtype}']


def operands(name):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  gates = jnp.asarray(rng.dirichlet(np.ones(K), size=T), jnp.float32)
  idx = jnp.asarray(CHOICES[name](rng), jnp.int32)
  return (draw(T, D), gates, draw(E, D, 2, F) / 4, draw(E, F, D) / 4), idx, draw(T, D)


def straight_through(a, qtype, axes):
  method = low_precision.CALIBRATION[qtype]
  quantised = qwix.quantize(a, qtype, channelwise_axes=axes, calibration_method=method)
  rounded = qwix.dequantize(quantised)
  return a + jax.lax.stop_gradient(rounded - a)


def reference(qtype, x, gates, gate_up, down, idx):
  """Every token through every one of its experts, one choice at a time."""
  x = straight_through(x, qtype, (0,))
  gate_up = straight_through(gate_up.reshape(E, D, 2 * F), qtype, (0, 2))
  down = straight_through(down, qtype, (0, 2))
  out = jnp.zeros_like(x)
  for k in range(K):
    e = jnp.minimum(idx[:, k], E - 1)
    h = jnp.einsum('TD,TDG->TG', x, gate_up[e])
    a = layers.swiglu(h.reshape(T, 2, F)) * gates[:, k, None]
    y = jnp.einsum('TF,TFD->TD', straight_through(a, qtype, (0,)), down[e])
    out += jnp.where(idx[:, k, None] < E, y, 0)
  return out


@functools.cache
def compiled(backend):
  def fn(args, idx, cotangent):
    def call(*a):
      return dropless.dispatch(a[0], a[1], idx, *a[2:], backend, 0)

    if backend.startswith('reference '):

      def call(*a):
        return reference(backend.split()[1], *a, idx)

    out, vjp = jax.vjp(call, *args)
    return out, *vjp(cotangent)

  return tiny.jit(fn)


@pytest.mark.parametrize('choices', CHOICES)
@pytest.mark.parametrize('qtype', QTYPES)
@pytest.mark.parametrize('kind', ['', 'legs '])
def test_values_and_gradients_are_those_of_the_reference(kind, qtype, choices):
  args, idx, cotangent = operands(choices)
  got = compiled(kind + qtype)(args, idx, cotangent)
  want = compiled(f'reference {qtype}')(args, idx, cotangent)
  for name, a, b in zip(('out', 'x', 'gates', 'gate_up', 'down'), got, want):
    a, b = np.asarray(a), np.asarray(b)
    assert np.isfinite(a).all(), name
    # A number on the border of two roundings may fall to either side: few do, by one step.
    scale = np.abs(b).max()
    assert np.abs(a - b).max() <= 0.01 * scale, name
    assert np.mean(np.abs(a - b) > 1e-4 * scale) < 0.2, name


@pytest.mark.parametrize('qtype', QTYPES)
def test_error_against_full_precision(qtype):
  args, idx, cotangent = operands('spread')
  got, full = compiled(qtype)(args, idx, cotangent), compiled('blocks')(args, idx, cotangent)
  for a, b in zip(got, full):
    error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    assert 1e-4 < error < ERROR[qtype]


def test_an_untouched_default_rounds_nothing():
  args, idx, cotangent = operands('spread')
  got, want = (compiled(name)(args, idx, cotangent) for name in ('auto', 'blocks'))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  dense = DISPATCHES['dense'](*args[:2], idx, *args[2:], '', 0)
  np.testing.assert_allclose(got[0], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # compiles whole training steps
@pytest.mark.parametrize('qtype', QTYPES)
def test_loads_do_not_see_it_and_the_loss_falls(qtype):
  rows = tiny.batch()
  plain = tiny.make(model__moe__dispatch='dropless')
  rounded = tiny.make(model__moe__dispatch='dropless', model__moe__grouped_matmul=qtype)
  state = train_state.init_state(rounded, tiny.mesh(1)).replace(params=tiny.params(plain.model))
  one, other = (
    tiny.jit(functools.partial(objective.gradients, cfg))(state.params, {}, rows, jnp.uint32(0))
    for cfg in (plain, rounded)
  )
  # The first MoE layer sees the same input, so it routes the same tokens to the same experts.
  np.testing.assert_array_equal(one[0].stats.sums.load[0], other[0].stats.sums.load[0])
  assert float(one[0].main) != float(other[0].main)
  step = tiny.jit(optimizer_step.step_function(rounded))
  losses = []
  for _ in range(8):
    state, figures = step(state, rows)
    losses.append(float(figures.loss))
  assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize('dispatch', ['dense', 'gather'])
def test_other_dispatches_are_refused(dispatch):
  with pytest.raises(errors.InputError, match="grouped_matmul='int8'.*dropless"):
    tiny.make(model__moe__dispatch=dispatch, model__moe__grouped_matmul='int8')


def test_without_qwix_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.InputError, match=r"pip install 'moe_jax\[quant\]'"):
    low_precision.rounding('int8')


def test_a_run_does_not_become_another_without_a_word():
  """Kernels may change under a run, the numbers that they see may not."""
  old = json.loads(json.dumps(parse.to_dict(tiny.make())))
  for name, placed in (('ragged_dot', True), ('int8', False)):
    found = run_record.differences(old, tiny.make(model__moe__grouped_matmul=name))
    assert bool(found.placement) == placed and bool(found.changes) != placed


def test_the_largest_number_of_a_row_comes_back():
  """Not as one of two neighbours, by the last bit: 127.5 steps would be a tie."""
  rows = jnp.array([[3.0, -7.3, 1.0], [0.0, 0.0, 0.0], [5.1, 2.0, -5.1]])
  for qtype in QTYPES:
    got = low_precision.rounding(qtype).rows(rows)
    np.testing.assert_allclose(got[0, 1], -7.3, rtol=1e-6)
    np.testing.assert_allclose(got[2, [0, 2]], [5.1, -5.1], rtol=1e-6)
    assert not np.asarray(got[1]).any()
