import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models import layers
from tests import tiny
from tests.models import blocks


def test_rms_norm_by_hand():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  got = layers.RMSNorm(0.5, jnp.float32).apply({'params': {'scale': jnp.array([1.0, 2.0])}}, x)
  # mean of squares 12.5, + eps = 13: (3 / sqrt 13, 2 * 4 / sqrt 13); zeros stay zeros
  np.testing.assert_allclose(got, [[3 / 13**0.5, 8 / 13**0.5], [0, 0]], rtol=1e-6)


def test_rms_norm_of_bfloat16_squares_in_float32():
  x = jnp.full((1, 4096), 3.0, jnp.bfloat16)  # 4096 squares summed in bfloat16 would stall at 2048
  got = layers.RMSNorm(0.0, jnp.bfloat16).apply({'params': {'scale': jnp.ones(4096)}}, x)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(got, np.float32), 1)


def test_swiglu_takes_the_gate_first():
  h = jnp.array([[[1.0, -2.0], [3.0, 5.0]]])  # gates (1, -2), ups (3, 5)

  def silu(g):
    return g / (1 + np.exp(-g))

  np.testing.assert_allclose(layers.swiglu(h), [[silu(1) * 3, silu(-2) * 5]], rtol=1e-6)


def test_feed_forward_is_the_formula_and_keeps_its_dtypes():
  module = layers.FeedForward(5, 0.5, jnp.float32, jnp.float32)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
  boxed = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  gate_up, down = boxed['gate_up'], boxed['down']
  assert gate_up.names == ('embed', 'gate_up', 'mlp') and down.names == ('mlp', 'embed')

  def draw(box):
    return np.random.default_rng(1).normal(size=box.value.shape).astype(np.float32)

  gate_up, down = draw(gate_up), draw(down)
  gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
  want = (gate * jax.nn.sigmoid(gate) * up) @ down
  got = module.apply({'params': {'gate_up': gate_up, 'down': down}}, x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  low = layers.FeedForward(5, 0.5, jnp.bfloat16, jnp.float32)
  got = low.apply({'params': {'gate_up': gate_up, 'down': down}}, x.astype(jnp.bfloat16))
  assert got.dtype == jnp.bfloat16


def test_init_weight_has_the_asked_deviation():
  box = layers.init_weight(0.006, 'embed', 'mlp')(jax.random.key(0), (200, 500), jnp.float32)
  # 1e5 draws: the sample deviation is good to 0.2 %
  np.testing.assert_allclose(np.std(box.value), 0.006, rtol=0.01)
  assert abs(np.mean(box.value)) < 1e-4


def test_feed_forward_with_its_width_split_is_that_of_one_device():
  """What travels is the sum of the outputs, and in the backward pass that of their gradients."""
  module = layers.FeedForward(6, 0.5, jnp.float32, jnp.float32)
  x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
  boxed = jax.eval_shape(module.init, jax.random.key(0), x)['params']

  def apply(params, x):
    return module.apply({'params': params}, x)

  (split, args), (one, whole) = (
    blocks.compile_on(axes, apply, boxed, x) for axes in (dict(tensor=2), dict(data=1))
  )
  tiny.assert_trees_close(split(*args), one(*whole), rtol=1e-5, atol=1e-6)
  # An all-reduce between two devices sends half of the array twice.
  assert blocks.travelling(split, dict(tensor=2)) == {'tensor': {'all-reduce': 2 * x.nbytes}}
