"""The observed attention is that of a model: outputs, gradients; and what changes it does that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.attention import latent, multi_head, observed
from tests import tiny

KINDS = {
  'mha': {'model__attention__num_kv_heads': 2},
  'gqa': {'model__num_heads': 4, 'model__attention__num_kv_heads': 2},
  'mla': tiny.MLA,
}
# Two documents and padding; one document.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
POSITIONS = np.array([[*range(5), *range(4), *range(3)], range(12)], np.int32)
CTX = multi_head.Context(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
VISIBLE = np.tril(SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS > 0)[:, None]
REAL = (SEGMENTS > 0)[..., None]


def layers(kind, impl='auto'):
  """(the model's layer, the observed one, parameters, input) of one kind."""
  cfg = tiny.make(**KINDS[kind], model__attention__impl=impl).model
  fast, slow = multi_head.Attention, observed.Attention
  if kind == 'mla':
    fast, slow = latent.MLA, observed.MLA
  args = (cfg.attention, cfg.num_heads, 0.3, jnp.float32, jnp.float32)
  x = np.random.default_rng(0).normal(size=(2, 12, cfg.embed_dim)).astype(np.float32)
  fast, slow = fast(*args), slow(*args)
  params = jax.tree.map(jnp.asarray, tiny.params(cfg)['moe_layers']['attention'])
  return fast, slow, jax.tree.map(lambda a: a[0], params), x


def applied(layer, params, x, control):
  variables = {'params': params}
  if control:
    variables[observed.CONTROL] = {observed.CONTROL: control}
  (out, *_), sown = layer.apply(variables, x, CTX, None, mutable=['intermediates'])
  return jnp.where(REAL, out, 0.0), sown.get('intermediates', {})


jitted = tiny.jit(applied, static_argnums=0)


def run(layer, params, x, **control):
  """(output of real tokens, what was sown)."""
  control = jax.tree.map(jnp.asarray, control)
  return jax.tree.map(np.asarray, jitted(layer, params, x, control))


@pytest.mark.parametrize('impl', ['reference', 'short', 'chunked'])
@pytest.mark.parametrize('kind', KINDS)
def test_it_is_the_models_attention(kind, impl):
  fast, slow, params, x = layers(kind, impl)
  weight = np.random.default_rng(1).normal(size=x.shape)

  def loss(layer, params, x):
    out, _ = applied(layer, params, x, {})
    return (out * weight).sum(), out

  both = [
    tiny.jit(jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0)(one, params, x)
    for one in (slow, fast)
  ]
  ((_, got), got_grad), ((_, want), want_grad) = both
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  tiny.assert_trees_close(got_grad, want_grad, rtol=1e-3, atol=1e-5)
  assert np.abs(want).max() > 0.1


@pytest.mark.parametrize('kind', KINDS)
def test_factors_and_hidden_keys(kind):
  """Under a mask the other keys share the weight; behind factors nothing is shared again."""
  _, slow, params, x = layers(kind)
  rng = np.random.default_rng(2)
  hidden = np.tril(rng.random(VISIBLE.shape) < 0.3, -1)
  out, sown = run(slow, params, x)
  probs = np.asarray(sown[observed.PROBS][0])
  seen = np.broadcast_to(VISIBLE[:, None], probs.shape)
  real = np.broadcast_to(REAL[:, None], probs.shape)
  assert not probs[~seen & real].any()
  np.testing.assert_allclose(probs.sum(axis=-1), 1.0, rtol=1e-5)
  masked, more = run(slow, params, x, hidden=hidden)
  scale = slow.cfg.softmax_scale
  want = observed.probabilities(
    sown[observed.QUERIES][0], sown[observed.KEYS][0], VISIBLE & ~hidden, scale
  )
  np.testing.assert_allclose(more[observed.PROBS][0], want, rtol=1e-5, atol=1e-7)
  assert not np.asarray(more[observed.PROBS][0])[hidden[:, None] & real].any()
  # Zeros as factors take as much away, and the rest keeps its weight: another output.
  zeroed, more = run(slow, params, x, factors=1.0 - hidden[:, None])
  np.testing.assert_array_equal(more[observed.PROBS][0], probs)
  assert np.abs(zeroed - masked).max() > 1e-3 and np.abs(zeroed - out).max() > 1e-3
  # Both at once, with the weight that masked keys leave as a factor, is the masked one again.
  left = np.where(hidden[:, None], 0.0, want / np.where(probs > 0, probs, 1.0))
  again, _ = run(slow, params, x, factors=left)
  np.testing.assert_allclose(again, masked, rtol=1e-4, atol=1e-5)
  # Ones are nothing; a factor for all keys of a query scales its output.
  np.testing.assert_array_equal(run(slow, params, x, factors=np.ones_like(probs[:, :1]))[0], out)
  tripled = np.ones_like(probs)
  tripled[:, :, 3] = 3.0
  got, _ = run(slow, params, x, factors=tripled)
  np.testing.assert_allclose(got[:, 3], 3 * out[:, 3], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(got[:, 4:], out[:, 4:])


def test_a_factor_of_one_head_changes_what_that_head_reads():
  _, slow, params, x = layers('gqa')
  ones = np.ones((2, 4, 12, 12), np.float32)
  changed = ones.copy()
  changed[:, 2] = 0.0
  got, _ = run(slow, params, x, factors=changed)
  cut = {**params, 'o': params['o'].at[2].set(0.0)}  # [N, H, D]: as if that head gave nothing
  want, _ = run(slow, cut, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
