import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import config
from moe_jax.models import attention, rope

B, L, N, G, H, D = 3, 16, 4, 2, 8, 12  # N query heads in groups of G
LENGTHS = ((7, 9), (5, 4, 3), (16,))
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32 softmax and sums of 16 terms


@pytest.fixture(scope='module')
def ctx():
  rows = tiny.batch(LENGTHS)
  positions, segment_ids = (jnp.array(rows[key]) for key in ('positions', 'segment_ids'))
  return attention.Context(positions, segment_ids, positions, segment_ids, None)


def heads(seed, n):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(B, L, n, H)), jnp.float32)


def loop(q, k, v, segment_ids):
  """Attention by its definition; earlier in the row is earlier in the text."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  out = np.zeros_like(q)
  for b, i, n in np.ndindex(B, L, N):
    seen = [j for j in range(i + 1) if segment_ids[b, j] == segment_ids[b, i] > 0]
    if seen:
      scores = k[b, seen, n // G] @ q[b, i, n] / np.sqrt(H)
      weight = np.exp(scores - scores.max())
      out[b, i, n] = weight / weight.sum() @ v[b, seen, n // G]
  return out


def test_attend_equals_a_loop_over_queries(ctx):
  q, k, v = heads(0, N), heads(1, N // G), heads(2, N // G)
  got = attention.attend(q, k, v, attention.visible(ctx))
  real = np.asarray(ctx.segment_ids) > 0
  want = loop(q, k, v, np.asarray(ctx.segment_ids))
  np.testing.assert_allclose(np.asarray(got)[real], want[real], **CLOSE)
  assert np.isfinite(got).all()  # padding too


def test_visible_by_hand():
  # Documents 1 1 2 2 and padding, positions 0 1 0 1 0.
  segment_ids, positions = jnp.array([[1, 1, 2, 2, 0]]), jnp.array([[0, 1, 0, 1, 0]])
  ctx = attention.Context(positions, segment_ids, positions, segment_ids, None)
  want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(attention.visible(ctx)[0], np.array(want, bool))


def test_scores_and_softmax_are_in_float32():
  q = k = v = heads(0, N).astype(jnp.bfloat16)
  mask = jnp.ones((B, L, L), bool)
  got = attention.attend(q, k, v, mask)
  assert got.dtype == jnp.bfloat16
  text = str(jax.make_jaxpr(attention.attend)(q, k, v, mask))
  exp = next(line for line in text.splitlines() if ' exp ' in line)
  assert ':f32[' in exp


CFG = config.AttentionConfig(num_kv_heads=N // G, head_dim=H, rope_theta=100.0)
X = jnp.asarray(np.random.default_rng(3).normal(size=(B, L, D)), jnp.float32)


def make_params(kv_heads):
  rng = np.random.default_rng(4)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
  kv = (D, kv_heads, H)
  return {'q': draw(D, N, H), 'o': draw(N, H, D), 'k': draw(*kv), 'v': draw(*kv)}


@functools.partial(tiny.jit, static_argnames='num_kv_heads')
def apply(params, x, ctx, num_kv_heads=N // G):
  cfg = config.AttentionConfig(num_kv_heads, H, 100.0)
  module = attention.Attention(cfg, N, 0.02, jnp.float32, jnp.float32)
  return module.apply({'params': params}, x, ctx, None)[0]


def test_module_is_projections_rotation_attention_projection(ctx):
  params = make_params(N // G)
  project = lambda name: jnp.einsum('bld,dnh->blnh', X, params[name])
  angle = rope.angles(ctx.positions, H, CFG.rope_theta)
  q, k = rope.rotate(project('q'), angle), rope.rotate(project('k'), angle)
  out = loop(q, k, project('v'), np.asarray(ctx.segment_ids))
  want = np.einsum('blnh,nhd->bld', out, params['o'])
  real = np.asarray(ctx.segment_ids) > 0
  np.testing.assert_allclose(np.asarray(apply(params, X, ctx))[real], want[real], 1e-4, 1e-4)


def test_gqa_equals_mha_with_repeated_key_value_heads(ctx):
  params = make_params(N // G)
  repeated = params | {name: jnp.repeat(params[name], G, axis=1) for name in ('k', 'v')}
  got, want = apply(params, X, ctx), apply(repeated, X, ctx, num_kv_heads=N)
  np.testing.assert_allclose(got, want, **CLOSE)


def changed(x, b, at):
  return x.at[b, at].add(1.0)


@pytest.mark.parametrize(
  'b, at, touched',
  [
    (0, 3, range(3, 7)),  # the first document of 7 + 9, from the token on
    (0, 7, range(7, 16)),  # the first token of the second one
    (0, 15, range(15, 16)),  # the last one
    (1, 14, ()),  # padding
  ],
)
def test_a_token_reaches_itself_and_later_ones_of_its_document(ctx, b, at, touched):
  params = make_params(N // G)
  before, after = apply(params, X, ctx), apply(params, changed(X, b, at), ctx)
  real = np.asarray(ctx.segment_ids) > 0
  differs = (np.asarray(before) != np.asarray(after)).any(-1) & real
  want = np.zeros((B, L), bool)
  want[b, list(touched)] = True
  np.testing.assert_array_equal(differs, want)


def test_a_document_does_not_depend_on_its_place_in_the_row(ctx):
  params = make_params(N // G)
  packed = apply(params, X[:1], jax.tree.map(lambda a: a[:1], ctx))
  positions, ones = jnp.arange(9)[None], jnp.ones((1, 9), jnp.int32)
  alone = attention.Context(positions, ones, positions, ones, None)
  np.testing.assert_allclose(packed[:, 7:], apply(params, X[:1, 7:], alone), **CLOSE)
