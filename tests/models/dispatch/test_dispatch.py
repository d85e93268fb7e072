"""All dispatches against `dense`, values and all gradients, and what they may not contain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.dispatch import DISPATCHES
from moe_jax.models.dispatch import gather as gather_lib
from moe_jax.models.experts import backends, cpu_blocks, grouped_kernels, grouped_products
from tests import tiny

T, K, E, D, F = 21, 2, 5, 12, 10  # 42 choices: no multiple of a block's height
ARGS = ('x', 'gates', 'gate_up', 'down')
KERNELS = (
  *(('dropless', name) for name in ('blocks', 'ragged_dot', 'megablox_text')),
  ('capacity', ''),
  ('gather', ''),
)
# Two float32 sums in another order, of at most a few hundred terms of magnitude about 1.
CLOSE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture(scope='module', autouse=True)
def tokamax_on_cpu():
  """What a CPU has of other platforms' backends: tokamax's XLA products, and megablox's text."""
  products = {
    'tokamax_xla': lambda: grouped_kernels.tokamax_products(('xla',), ('xla',)),
    'megablox_text': lambda: grouped_kernels.megablox_products(interpret=True),
  }
  for name, make in products.items():
    backends.BACKENDS[name] = lambda make=make: grouped_products.GroupedExperts(make())
  yield
  del backends.BACKENDS['tokamax_xla'], backends.BACKENDS['megablox_text']


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


@pytest.mark.parametrize('name, backend', [*KERNELS, ('dropless', 'tokamax_xla')])
@pytest.mark.parametrize('case', CASES)
def test_every_dispatch_equals_dense(case, name, backend):
  args = (*operands(), jnp.array(CASES[case]))
  assert_equal_results(run(name, backend)(*args), run('dense')(*args), **CLOSE)


@pytest.mark.parametrize('name', ['dropless', 'capacity', 'gather'])
def test_every_dispatch_equals_dense_for_mostly_unused_columns(name):
  idx = choose_few()
  args = (*operands(k=E), jnp.array(idx))
  got = run(name)(*args)
  assert_equal_results(got, run('dense')(*args), **CLOSE)
  d_gates = np.asarray(got[2])
  assert not d_gates[idx == E].any()
  assert d_gates[idx < E].all()


# 5 tokens are the most whose choices count as few.
@pytest.mark.parametrize('t', [1, 5, 6, T])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_kernels_laid_out_for_decoding_equal_dense(t, dtype):
  """Few choices (T K <= 2 E) and many; an unrouted token holds a NaN, which reaches nobody."""
  x, gates, gate_up, down, _ = operands(t=t, dtype=dtype)
  idx = choose(t=t)
  if t > 1:
    idx[0, 1] = idx[-1] = E
    x = x.at[-1].set(jnp.nan)
  laid_out = gather_lib.lay_out(gate_up, down)
  got = tiny.jit(gather_lib.apply)(x, gates, jnp.array(idx), laid_out)
  assert got.dtype == dtype
  wide = [a.astype(jnp.float32) for a in (x, gates, gate_up, down)]
  want = run('dense')(*wide, jnp.zeros((t, D)), jnp.array(idx))[0]
  # 8 bits of mantissa in the activations and in the result.
  tolerance = CLOSE if dtype == jnp.float32 else dict(rtol=0.03, atol=0.03)
  assert_equal_results((got.astype(jnp.float32),), (want,), **tolerance)


def test_few_choices_copy_no_weights():
  """The program needs less memory than the weights of a single expert have."""

  def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  laid_out = gather_lib.Kernels(of(16, 2, 128, 256), of(16, 256, 128))
  args = (of(2, 256), of(2, 3), jax.ShapeDtypeStruct((2, 3), jnp.int32), laid_out)
  memory = jax.jit(gather_lib.apply).lower(*args).compile().memory_analysis()
  expert = sum(4 * a.size // 16 for a in laid_out)
  assert memory.temp_size_in_bytes < expert


def test_capacity_needs_no_more_slots_than_the_fullest_expert_has_tokens():
  idx = choose_few()
  slots = int(np.bincount(idx.ravel(), minlength=E)[:E].max())
  assert slots < T
  args = (*operands(k=E), jnp.array(idx))
  got = run('capacity', slots=slots)(*args)
  assert_equal_results(got, run('dense')(*args), **CLOSE)


def test_capacity_fills_its_slots_in_token_order():
  # Two slots: of the tokens 0, 1, 2, ... that chose expert 3 first and 1 second, 0 and 1 fit.
  args = operands()
  idx = CASES['all tokens on the same']
  fitting = np.where(np.arange(T)[:, None] < 2, idx, E)
  got = run('capacity', slots=2)(*args, jnp.array(idx))
  assert_equal_results(got, run('dense')(*args, jnp.array(fitting)), **CLOSE)


def test_dense_is_the_formula():
  x, gates, gate_up, down, cotangent = operands()
  idx = CASES['padded tokens']
  got = run('dense')(x, gates, gate_up, down, cotangent, jnp.array(idx))[0]
  x, gates, gate_up, down = (np.asarray(a, np.float64) for a in (x, gates, gate_up, down))
  want = np.zeros((T, D))
  for t in range(T):
    for gate, expert in zip(gates[t], idx[t]):
      if expert < E:
        a, b = x[t] @ gate_up[expert, :, 0], x[t] @ gate_up[expert, :, 1]
        want[t] += gate * (a / (1 + np.exp(-a)) * b) @ down[expert]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('t, k, e', [(200, 1, 3), (1, 1, 1)])
def test_dropless_equals_dense_for_other_shapes(t, k, e):
  idx = jnp.array(padded(choose(t, k, range(e)), every=7, e=e) if t > 1 else choose(t, k, range(e)))
  args = (*operands(t, k, e), idx)
  assert_equal_results(run('dropless')(*args), run('dense')(*args), **CLOSE)


def test_all_tokens_on_one_expert_over_several_blocks():
  args = (*operands(200, 1, 3), jnp.ones((200, 1), jnp.int32))
  got = run('dropless')(*args)
  assert_equal_results(got, run('dense')(*args), **CLOSE)
  for weight in got[3:]:
    assert not np.asarray(weight)[[0, 2]].any()  # unused experts: exactly 0


@pytest.mark.parametrize('name, backend', KERNELS)
def test_bfloat16_is_as_close_as_its_rounding(name, backend):
  args = operands(dtype=jnp.bfloat16)
  idx = jnp.array(CASES['padded tokens'])
  got = run(name, backend)(*args, idx)
  wide = run('dense')(*(a.astype(jnp.float32) for a in args), idx)
  dtypes = ('bfloat16', 'bfloat16', 'float32', 'bfloat16', 'bfloat16')
  for key, dtype, a, b in zip(('out', *ARGS), dtypes, got, wide):
    assert a.dtype == dtype, key
    b = np.asarray(b, np.float64)
    # Some four roundings of 2^-9 in a row (h, activation, output, K-sum), of terms that cancel.
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, 0, 2**-6 * np.abs(b).max(), err_msg=key
    )


@pytest.mark.parametrize('name, backend', KERNELS)
def test_padded_tokens_get_and_give_exactly_nothing(name, backend):
  idx = CASES['padded tokens']
  out, d_x, d_gates, *_ = run(name, backend)(*operands(), jnp.array(idx))
  off = idx[:, 0] == E
  for a in (out, d_x, d_gates):
    assert not np.asarray(a)[off].any()
    assert np.asarray(a)[~off].all()


@pytest.mark.parametrize('poisoned', ['activations', 'cotangents'])
@pytest.mark.parametrize('name, backend', [*KERNELS, ('dense', 'blocks')])
def test_nan_in_padded_tokens_stays_there(name, backend, poisoned):
  x, gates, gate_up, down, cotangent = operands()
  idx = CASES['padded tokens']
  off = idx[:, 0] == E
  clean = run(name, backend)(x, gates, gate_up, down, cotangent, jnp.array(idx))

  def poison(a):
    return a.at[np.nonzero(off)].set(jnp.nan)

  x, cotangent = (poison(x), cotangent) if poisoned == 'activations' else (x, poison(cotangent))
  got = run(name, backend)(x, gates, gate_up, down, cotangent, jnp.array(idx))
  for key, a, b in zip(('out', *ARGS), got, clean):
    a, b = np.asarray(a), np.asarray(b)
    if len(a) == T:
      a, b = a[~off], b[~off]
    np.testing.assert_array_equal(a, b, err_msg=key)


def float_scatters(fn, *args):
  """Scatters of more than one row of floats; XLA for CPU expands them all, so HLO hides them."""
  found = []
  for eqn in tiny.equations(fn.trace(*args).jaxpr.jaxpr):
    if eqn.primitive.name.startswith('scatter'):
      operand, indices, _ = (v.aval for v in eqn.invars)
      many = np.prod(indices.shape[:-1]) > 1
      if many and jnp.issubdtype(operand.dtype, jnp.floating):
        found.append(eqn)
  return found


@pytest.mark.parametrize('backend', ['ragged_dot', 'tokamax_xla'])
def test_dropless_scatters_no_activation(backend):
  """On accelerators; the loop of `blocks` adds up in the order of experts, always."""
  args = (*operands(), jnp.array(CASES['random']))
  assert not float_scatters(run('dropless', backend), *args)

  # The detector sees what autodiff would make of a gather.
  def gather(x):
    return x[args[-1].reshape(-1)].sum()

  assert float_scatters(jax.jit(jax.grad(gather)), args[0])


def test_dropless_on_blocks_holds_no_buffer_of_all_rows():
  """None of [rows, D], which is what would grow; h [rows, 2 F] waits for the backward pass."""
  t, k, e = 21, 3, 7
  args = (*operands(t, k, e), jnp.array(choose(t, k, range(e))))
  text = run('dropless').lower(*args).compile().as_text()
  shapes = {
    tuple(int(n) for n in dims.split(',')) for dims in re.findall(r'(?:f32|bf16)\[([\d,]+)\]', text)
  }
  rows = t * k + cpu_blocks.ladder(t * k, e)[-1]
  assert (e, D, 2 * F) in shapes and (rows, 2 * F) in shapes  # the pattern does find shapes
  assert not [s for s in shapes if {t * k, rows} & set(s) and D in s]
  assert not [s for s in shapes if e in s and {t, t * k, rows} & set(s)]


@pytest.mark.parametrize('t, tallest', [(150, 64), (21, 32), (4, 32)])
def test_blocks_of_every_height_equal_dense(monkeypatch, t, tallest):
  """Several tall blocks and a low one per expert; one expert without a token."""
  monkeypatch.setattr(cpu_blocks, 'TALLEST', tallest)
  assert cpu_blocks.ladder(t * K, E)[-1] == tallest
  args = (*operands(t), jnp.array(padded(choose(t, allowed=(0, 2, 3, 4)), every=7)))
  fresh = run.__wrapped__('dropless')
  assert_equal_results(fresh(*args), run('dense')(*args), **CLOSE)


def test_ladder_has_a_height_for_the_mean_and_none_that_nobody_needs():
  assert cpu_blocks.ladder(4096 * 6, 64) == (32, 64, 128, 256, 384, 448, 480, 512)
  assert cpu_blocks.ladder(4096 * 6, 256) == (32, 64, 96, 128, 256, 512)
  assert cpu_blocks.ladder(1 << 20, 8) == (32, 64, 128, 256, 512)
  assert cpu_blocks.ladder(33, 4) == (32, 64)
  assert cpu_blocks.ladder(2, 64) == (32,)


def test_capacity_holds_no_row_per_token_and_column():
  """Its cost is that of the slots: nothing of [T, K, anything] or [T * K, anything], K = E."""
  t, slots = 21, 6
  args = (*operands(t, E), jnp.array(choose_few()))
  traced = run('capacity', slots=slots).trace(*args)
  shapes = {
    v.aval.shape
    for eqn in tiny.equations(traced.jaxpr.jaxpr)
    for v in eqn.outvars
    if jnp.issubdtype(v.aval.dtype, jnp.floating)
  }
  assert (E, slots, D) in shapes and (E, slots, 2, F) in shapes
  assert not [s for s in shapes if (len(s) > 2 and t in s) or (len(s) > 1 and t * E in s)]
