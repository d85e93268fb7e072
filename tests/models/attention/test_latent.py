"""Latent attention against its formulas, and its two forms against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import attention_config
from moe_jax.models.attention import latent as latent_lib
from moe_jax.models.attention import multi_head, rope
from tests import tiny
from tests.models import blocks

B, L, N, D = 3, 16, 4, 12
R, Q, HN, HR, HV = 6, 5, 4, 8, 3
OFF = attention_config.YarnConfig(1.0, 8, 32.0, 1.0, 1.0, 1.0)
YARN = attention_config.YarnConfig(4.0, 8, 2.0, 0.5, 0.707, 0.707)
CLOSE = dict(rtol=2e-5, atol=2e-5)  # float32 sums of at most 16 terms, in another order


def make(q_lora=0, yarn=OFF, layout='interleaved'):
  sizes = attention_config.MLAConfig(q_lora, R, HN, HR, HV)
  rotary = attention_config.RopeConfig(100.0, layout, yarn)
  return attention_config.AttentionConfig('mla', 'reference', 1, 8, rotary, sizes, 0)


def module_of(cfg):
  return latent_lib.MLA(cfg, N, 0.02, jnp.float32, jnp.float32)


def make_params(cfg):
  rng = np.random.default_rng(1)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  def scale(n):
    return {'scale': 1 + draw(n) / 4}

  params = {'kv_a': draw(D, R + HR), 'kv_a_norm': scale(R), 'kv_b': draw(R, N, HN + HV)}
  params['o'] = draw(N, HV, D)
  if cfg.mla.q_lora_rank:
    return params | {'q_a': draw(D, Q), 'q_a_norm': scale(Q), 'q_b': draw(Q, N, HN + HR)}
  return params | {'q': draw(D, N, HN + HR)}


X = jnp.asarray(np.random.default_rng(3).normal(size=(B, L, D)), jnp.float32)
CASES = [(0, OFF), (Q, OFF), (0, YARN), (Q, YARN)]


@functools.cache
def context():
  rows = tiny.batch(((7, 9), (5, 4, 3), (16,)))
  return multi_head.Context(rows['positions'], rows['segment_ids'])


def norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x, positions, cfg):
  """Rotation of pairs (2i, 2i + 1) as complex numbers; pairs stay where they are."""
  freq = rope.inv_freq(HR, cfg.rope)
  pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None] * freq)
  return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def formula(params, cfg, ctx):
  """Appendix C of the paper, one query, one head at a time, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x, at, segment = np.asarray(X, np.float64), np.asarray(ctx.positions), np.asarray(ctx.segment_ids)
  latent = norm(x @ p['kv_a'][:, :R], p['kv_a_norm']['scale'])
  shared = turned(x @ p['kv_a'][:, R:], at, cfg)
  if cfg.mla.q_lora_rank:
    q = np.einsum('blq,qnh->blnh', norm(x @ p['q_a'], p['q_a_norm']['scale']), p['q_b'])
  else:
    q = np.einsum('bld,dnh->blnh', x, p['q'])
  kv = np.einsum('blr,rnh->blnh', latent, p['kv_b'])
  m = 0.1 * 0.707 * np.log(4) + 1 if cfg.rope.yarn.factor > 1 else 1.0
  scale = m**2 / np.sqrt(HN + HR)
  out = np.zeros((B, L, D))
  for b, i, n in np.ndindex(B, L, N):
    seen = [j for j in range(i + 1) if segment[b, j] == segment[b, i] > 0]
    if not seen:
      continue
    rotated = turned(q[b, i, n, HN:], at[b, i], cfg)
    scores = scale * (kv[b, seen, n, :HN] @ q[b, i, n, :HN] + shared[b, seen] @ rotated)
    weight = np.exp(scores - scores.max())
    out[b, i] += (weight / weight.sum() @ kv[b, seen, n, HN:]) @ p['o'][n]
  return out


@functools.cache
def applied(q_lora, yarn):
  """(params, output, cache) of the expanded form on packed rows."""
  cfg = make(q_lora, yarn)
  params = make_params(cfg)
  run = tiny.jit(lambda p, x: module_of(cfg).apply({'params': p}, x, context(), None)[:2])
  return params, *run(params, X)


@pytest.mark.parametrize('q_lora, yarn', CASES)
def test_expanded_form_is_the_papers_formula(q_lora, yarn):
  params, out, cache = applied(q_lora, yarn)
  real = np.asarray(context().segment_ids) > 0
  want = formula(params, make(q_lora, yarn), context())
  np.testing.assert_allclose(np.asarray(out)[real], want[real], 1e-4, 1e-4)
  assert cache.latent.shape == (B, L, R) and cache.rope_key.shape == (B, L, HR)


@pytest.mark.parametrize('q_lora, yarn', CASES)
def test_absorbed_form_equals_the_expanded_one_token_by_token(q_lora, yarn):
  """One document per row; the cache has more slots than tokens, filled with what must not count."""
  cfg = make(q_lora, yarn)
  params, positions = make_params(cfg), jnp.broadcast_to(jnp.arange(L), (B, L))
  ones = jnp.ones((B, L), jnp.int32)
  module = module_of(cfg)
  want = module.apply({'params': params}, X, multi_head.Context(positions, ones), None)[0]
  cache = latent_lib.LatentCache(jnp.full((B, L + 3, R), 9.0), jnp.full((B, L + 3, HR), 9.0))

  @tiny.jit
  def step(cache, x, at):
    ctx = multi_head.Context(at, jnp.ones_like(at))
    return module.apply({'params': params}, x, ctx, cache)[:2]

  # Tokens come in twos: the second must see the first, and not the other way round.
  for i in range(0, L, 2):
    out, cache = step(cache, X[:, i : i + 2], positions[:, i : i + 2])
    np.testing.assert_allclose(out, want[:, i : i + 2], **CLOSE)


@pytest.mark.parametrize('q_lora', [0, Q])
def test_gradients_of_both_forms_agree(q_lora):
  """The absorbed form on a full cache of the same tokens, differentiated."""
  cfg = make(q_lora, YARN)
  params, positions = make_params(cfg), jnp.broadcast_to(jnp.arange(L), (B, L))
  ctx = multi_head.Context(positions, jnp.ones((B, L), jnp.int32))
  empty = latent_lib.LatentCache(jnp.zeros((B, L, R)), jnp.zeros((B, L, HR)))
  grads = [
    tiny.jit(
      jax.grad(lambda p, c=cache: (module_of(cfg).apply({'params': p}, X, ctx, c)[0] ** 2).sum())
    )(params)
    for cache in (None, empty)
  ]
  tiny.assert_trees_close(*grads, rtol=1e-3, atol=1e-4)  # sums over 48 squared outputs
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))


def test_the_key_of_position_has_no_norm_and_the_latent_has():
  """A larger input scales the rotated key alone."""
  cfg = make()
  params = make_params(cfg)

  def apply(x):
    return module_of(cfg).apply({'params': params}, x, context(), None)[1]

  one, four = apply(X), apply(4 * X)
  np.testing.assert_allclose(four.rope_key, 4 * one.rope_key, rtol=1e-5)
  np.testing.assert_allclose(four.latent, one.latent, 1e-4, 1e-4)


def test_layouts_are_one_permutation_of_the_rotated_rows_apart():
  """Rows 0, 2, 4, ... 1, 3, ... of the rotated parts turn one layout into the other, exactly."""
  perm = np.r_[0:HR:2, 1:HR:2]
  cfg, half = make(), make(layout='half')
  params = make_params(cfg)
  moved = dict(params)
  moved['q'] = jnp.concatenate([params['q'][..., :HN], params['q'][..., HN:][..., perm]], -1)
  moved['kv_a'] = jnp.concatenate([params['kv_a'][:, :R], params['kv_a'][:, R:][:, perm]], -1)

  def run(c, p):
    return module_of(c).apply({'params': p}, X, context(), None)[0]

  np.testing.assert_allclose(run(half, moved), run(cfg, params), **CLOSE)


def test_bfloat16_keeps_scores_in_float32():
  cfg = dataclasses.replace(make())
  params = make_params(cfg)
  module = latent_lib.MLA(cfg, N, 0.02, jnp.bfloat16, jnp.float32)
  cache = latent_lib.LatentCache(
    jnp.zeros((B, L, R), jnp.bfloat16), jnp.zeros((B, L, HR), jnp.bfloat16)
  )
  for given in (None, cache):

    def run(x, c=given):
      return module.apply({'params': params}, x, context(), c)[0]

    text = str(jax.make_jaxpr(run)(X.astype(jnp.bfloat16)))
    exp = next(line for line in text.splitlines() if ' exp ' in line)
    assert ':f32[' in exp


# Over devices

# Every axis below divides these, and they tell themselves apart in shapes: R 6, Hr 8.
EVEN = attention_config.MLAConfig(4, 6, 4, 8, 3)


def compile_on(axes, cfg):
  """A block with its gradients, 0 for padding, on a mesh."""
  module, ids = module_of(cfg), jnp.zeros((1, 1), jnp.int32)
  args = jnp.zeros((1, 1, D)), multi_head.Context(ids, ids), None
  boxed = jax.eval_shape(module.init, jax.random.key(0), *args)['params']

  def apply(params, x, positions, segment_ids):
    out = module.apply({'params': params}, x, multi_head.Context(positions, segment_ids), None)[0]
    return jnp.where((segment_ids > 0)[..., None], out, 0)

  rows = tiny.batch(((7, 9), (5, 4, 3), (16,), (2, 9)))
  x = np.random.default_rng(3).normal(size=(4, L, D)).astype(np.float32)
  return blocks.compile_on(axes, apply, boxed, x, rows['positions'], rows['segment_ids'])


@functools.cache
def on_one_device(cfg):
  program, arguments = compile_on(dict(data=1), cfg)
  return program(*arguments)


@pytest.mark.parametrize('impl', ['reference', 'chunked'])
@pytest.mark.parametrize(
  'axes',
  [dict(sequence=2, tensor=2), dict(fsdp=2, sequence=2, tensor=2), dict(data=2, tensor=4)],
  ids=str,
)
def test_a_block_over_devices_is_that_of_one(axes, impl):
  cfg = dataclasses.replace(make(Q, YARN), mla=EVEN)
  program, arguments = compile_on(axes, dataclasses.replace(cfg, impl=impl))
  tiny.assert_trees_close(program(*arguments), on_one_device(cfg), rtol=1e-4, atol=1e-5)


def test_latents_travel_and_not_what_is_made_of_them():
  """Per token R + Hr numbers there, and as many gradients back; heads would be N (Hn + Hr + Hv)."""
  program, _ = compile_on(dict(sequence=4), dataclasses.replace(make(Q, YARN), mla=EVEN))
  sent = blocks.travelling(program, dict(sequence=4))['sequence']
  share = 3 / 4 * 4 * L * 4  # of one float32 per token, three of four parts
  assert sent['all-gather'] == share * (6 + 8 + 2)  # and two integers
  assert sent['reduce-scatter'] == share * (6 + 8)
