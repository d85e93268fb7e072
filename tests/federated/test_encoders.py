import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.federated import encoders, settings


@pytest.mark.parametrize('dataset, width, parameters', [
  ('digits', 64, 64 * 64 + 64),
  ('mnist', 128, 9 * 32 + 32 + 9 * 32 * 64 + 64 + 9216 * 128 + 128),  # 9216 is the paper's
  ('cifar10', 64, 853_018 - 650),  # a ResNet-56 without its head
])  # fmt: skip
def test_sizes(dataset, width, parameters):
  cfg = settings.resolve(settings.Settings(dataset=dataset))
  params = jax.eval_shape(lambda: encoders.init(cfg, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
  images = jax.ShapeDtypeStruct((3, *cfg.data.shape), jnp.uint8)
  found = jax.eval_shape(lambda p, x: encoders.encode(cfg, p, x), params, images)
  assert found.shape == (3, width)


def test_pixels_reach_from_0_to_1_and_rows_do_not_mix(images):
  cfg = settings.resolve(settings.Settings())
  params = encoders.init(cfg, jax.random.key(0))
  layer = params['Dense_0']
  found = encoders.encode(cfg, params, images.train_x[:3])
  expected = images.train_x[:3].reshape(3, 64) / 16 @ np.asarray(layer['kernel']) + layer['bias']
  np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training():
  cfg = settings.resolve(settings.Settings(dataset='mnist'))
  params = jax.jit(lambda key: encoders.init(cfg, key))(jax.random.key(0))
  images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
  encode = jax.jit(lambda p, x, key=None: encoders.encode(cfg, p, x, key))
  dropped, other = (encode(params, images, jax.random.key(i)) for i in (0, 1))
  assert (dropped != other).any() and (dropped == 0).mean() > (encode(params, images) == 0).mean()
