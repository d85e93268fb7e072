import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import attention_config
from moe_jax.models.attention import multi_head, rope
from moe_jax.models.attention.kernels import reference
from tests import tiny
from tests.models import blocks

B, L, N, G, H, D = 3, 16, 4, 2, 8, 12  # N query heads in groups of G
LENGTHS = ((7, 9), (5, 4, 3), (16,))
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32 softmax and sums of 16 terms


@pytest.fixture(scope='module')
def ctx():
  rows = tiny.batch(LENGTHS)
  positions, segment_ids = (jnp.array(rows[key]) for key in ('positions', 'segment_ids'))
  return multi_head.Context(positions, segment_ids)


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
  got = reference.attend(q, k, v, *ctx, H**-0.5)
  real = np.asarray(ctx.segment_ids) > 0
  want = loop(q, k, v, np.asarray(ctx.segment_ids))
  np.testing.assert_allclose(np.asarray(got)[real], want[real], **CLOSE)
  assert np.isfinite(got).all()  # padding too


def test_visible_by_hand():
  # Documents 1 1 2 2 and padding, positions 0 1 0 1 0.
  segment_ids, positions = jnp.array([[1, 1, 2, 2, 0]]), jnp.array([[0, 1, 0, 1, 0]])
  visible = reference.visible(positions, segment_ids, positions, segment_ids)
  want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(visible[0], np.array(want, bool))


def test_scores_and_softmax_are_in_float32():
  q = k = v = heads(0, N).astype(jnp.bfloat16)
  mask = jnp.ones((B, L, L), bool)
  attend = functools.partial(reference.masked, scale=1.0)
  got = attend(q, k, v, mask)
  assert got.dtype == jnp.bfloat16
  text = str(jax.make_jaxpr(attend)(q, k, v, mask))
  exp = next(line for line in text.splitlines() if ' exp ' in line)
  assert ':f32[' in exp


YARN = attention_config.YarnConfig(1.0, 16, 32.0, 1.0, 1.0, 1.0)
ROPE = attention_config.RopeConfig(100.0, 'half', YARN)
UNREAD = attention_config.MLAConfig(0, 1, 1, 2, 1)
X = jnp.asarray(np.random.default_rng(3).normal(size=(B, L, D)), jnp.float32)


def make_params(kv_heads):
  rng = np.random.default_rng(4)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

  kv = (D, kv_heads, H)
  return {'q': draw(D, N, H), 'o': draw(N, H, D), 'k': draw(*kv), 'v': draw(*kv)}


def module_of(num_experts, num_kv_heads=N // G, threshold=0.0):
  cfg = attention_config.AttentionConfig(
    'gqa', 'reference', num_kv_heads, H, ROPE, UNREAD, num_experts
  )
  return multi_head.Attention(cfg, N, 0.02, jnp.float32, jnp.float32, threshold)


@functools.partial(tiny.jit, static_argnames=('num_kv_heads', 'num_experts', 'threshold'))
def run(params, x, ctx, num_experts=0, **sizes):
  """(output, sums of the mixture)."""
  module = module_of(num_experts, **sizes)
  out, cache, sums = module.apply({'params': params}, x, ctx, None)
  assert cache.key.shape == (*x.shape[:2], module.cfg.num_kv_heads, H)
  return out, sums


def apply(params, x, ctx, **sizes):
  return run(params, x, ctx, **sizes)[0]


def heads_of(params, ctx):
  """What each head adds before its output projection: [B, L, N, H] in numpy."""

  def project(name):
    return jnp.einsum('bld,dnh->blnh', X, params[name])

  angle = rope.angles(ctx.positions, H, ROPE)
  q, k = (rope.rotate(project(name), angle, ROPE) for name in 'qk')
  return loop(q, k, project('v'), np.asarray(ctx.segment_ids))


def test_module_is_projections_rotation_attention_projection(ctx):
  params = make_params(N // G)
  want = np.einsum('blnh,nhd->bld', heads_of(params, ctx), params['o'])
  real = np.asarray(ctx.segment_ids) > 0
  out, sums = run(params, X, ctx)
  np.testing.assert_allclose(np.asarray(out)[real], want[real], 1e-4, 1e-4)
  assert sums is None  # no mixture


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
  alone = multi_head.Context(positions, ones)
  np.testing.assert_allclose(packed[:, 7:], apply(params, X[:1, 7:], alone), **CLOSE)


# Mixture of attention heads: G experts of N / G heads each, since heads j G + i make expert i.


def mixture_params(seed=5):
  router = np.random.default_rng(seed).normal(size=(D, G)) / 2
  return make_params(N // G) | {'router': jnp.asarray(router, jnp.float32)}


def gates_of(params):
  logits = np.asarray(X, np.float64) @ np.asarray(params['router'], np.float64)
  gates = np.exp(logits - logits.max(-1, keepdims=True))
  return gates / gates.sum(-1, keepdims=True)


def mixture_formula(params, ctx, gates):
  """sum_i gate_i sum_j head_ij: expert i owns the i-th head of every key-value head j."""
  heads, o = heads_of(params, ctx), np.asarray(params['o'], np.float64)
  out = np.zeros((B, L, D))
  for i in range(G):
    for j in range(N // G):
      out += gates[..., i, None] * (heads[:, :, j * G + i] @ o[j * G + i])
  return out


@pytest.mark.parametrize('threshold', [0.0, 0.8])
def test_mixture_is_its_formula_and_a_threshold_prunes(ctx, threshold):
  params, real = mixture_params(), np.asarray(ctx.segment_ids) > 0
  gates = gates_of(params)
  active = G * gates > threshold  # with 0 all of them
  want = mixture_formula(params, ctx, np.where(active, gates, 0))
  out, sums = run(params, X, ctx, num_experts=G, threshold=threshold)
  np.testing.assert_allclose(np.asarray(out)[real], want[real], 1e-4, 1e-4)
  np.testing.assert_array_equal(sums.active, (active & real[..., None]).sum((1, 2)))
  pruned = G * real.sum() - int(sums.active.sum())
  assert (pruned == 0) == (threshold == 0) and pruned < real.sum()


def test_sums_of_the_mixture_count_real_tokens_and_forget_the_threshold(ctx):
  params, real = mixture_params(), np.asarray(ctx.segment_ids) > 0
  gates = np.where(real[..., None], gates_of(params), 0)
  for threshold in (0.0, 0.8):
    _, sums = run(params, X, ctx, num_experts=G, threshold=threshold)
    np.testing.assert_array_equal(sums.num_tokens, real.sum(1))
    np.testing.assert_allclose(sums.prob, gates.sum(1), rtol=1e-5)
    entropy = -(gates * np.log(np.where(gates > 0, gates, 1))).sum((1, 2))
    np.testing.assert_allclose(sums.entropy, entropy, rtol=1e-5)


def test_an_undecided_mixture_is_plain_attention_over_the_number_of_experts(ctx):
  params = mixture_params() | {'router': jnp.zeros((D, G))}
  got = apply(params, X, ctx, num_experts=G)
  plain = {name: value for name, value in params.items() if name != 'router'}
  real = ctx.segment_ids > 0
  np.testing.assert_allclose(got[real], (apply(plain, X, ctx) / G)[real], **CLOSE)


def test_a_decided_mixture_is_one_expert_and_a_high_threshold_nothing(ctx):
  """Gates 1 and 0: only every second head is left; gates 1/2 are below a threshold of 1.5 / 2."""
  params = mixture_params()
  sure = jnp.zeros((D, G)).at[0].set(jnp.array([0.0, 200.0]))
  x = X.at[..., 0].set(1.0)  # logits (0, 200)
  got = apply(params | {'router': sure}, x, ctx, num_experts=G)
  only = params['o'].at[::G].set(0)
  plain = {name: params[name] for name in 'qkv'} | {'o': only}
  real = ctx.segment_ids > 0
  np.testing.assert_allclose(got[real], apply(plain, x, ctx)[real], **CLOSE)
  undecided = params | {'router': jnp.zeros((D, G))}
  out, sums = run(undecided, X, ctx, num_experts=G, threshold=1.5)
  assert not np.asarray(out).any() and not np.asarray(sums.active).any()


def test_gradient_reaches_the_mixture_s_router(ctx):
  grad_of = tiny.jit(
    jax.grad(lambda p: (module_of(G).apply({'params': p}, X, ctx, None)[0] ** 2).sum())
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(grad_of(mixture_params())):
    assert np.abs(leaf).max() > 1e-3, path


def compile_on(axes, num_experts):
  """A block with its gradients, 0 for padding, on a mesh."""
  module, ids = module_of(num_experts), jnp.zeros((1, 1), jnp.int32)
  args = jnp.zeros((1, 1, D)), multi_head.Context(ids, ids), None
  boxed = jax.eval_shape(module.init, jax.random.key(0), *args)['params']

  def apply(params, x, positions, segment_ids):
    out = module.apply({'params': params}, x, multi_head.Context(positions, segment_ids), None)[0]
    return jnp.where((segment_ids > 0)[..., None], out, 0)

  rows = tiny.batch((*LENGTHS, (2, 9)))
  x = np.random.default_rng(3).normal(size=(4, L, D)).astype(np.float32)
  return blocks.compile_on(axes, apply, boxed, x, rows['positions'], rows['segment_ids'])


@pytest.mark.parametrize('num_experts', [0, G], ids=['heads', 'mixture of heads'])
@pytest.mark.parametrize(
  'axes', [dict(fsdp=2, sequence=2, tensor=2), dict(data=2, sequence=4)], ids=str
)
def test_a_block_over_devices_is_that_of_one(axes, num_experts):
  (split, args), (one, whole) = (compile_on(a, num_experts) for a in (axes, dict(data=1)))
  tiny.assert_trees_close(split(*args), one(*whole), rtol=1e-4, atol=1e-5)


def test_what_travels_when_heads_are_split():
  """The sum of the outputs; behind q, k and v in the backward pass that of the gradients of x."""
  program, (_, x, *_) = compile_on(dict(tensor=2), 0)
  # An all-reduce between two devices sends half of the array twice.
  assert blocks.travelling(program, dict(tensor=2)) == {'tensor': {'all-reduce': 4 * x.nbytes}}
