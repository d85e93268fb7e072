import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.federated import class_ratios, heads, rounds, settings


def test_ratios_by_hand():
  moves = np.zeros((3, 2, 3))
  moves[:, 0, 0] = [2.0, -0.5, -0.7]  # of class 0: the others move it by -0.6 on average
  moves[:, 1, 0] = [1.0, 0.1, -0.3]  # too: -0.1
  moves[:, 0, 1] = [-0.2, 4.0, -0.6]  # of class 1: -0.4
  moves[:, 1, 1] = [-0.9, 1.0, 0.0]  # of nobody: -0.9 is near the largest
  found = jax.jit(class_ratios.ratios)(moves)
  # (2 + 1) / (0.6 + 0.1); 4 / 0.4; nothing is of class 2.
  np.testing.assert_allclose(found, [3 / 0.7, 10, class_ratios.NO_RATIO], rtol=1e-5)


def test_weights_are_one_and_a_tenth_of_the_ratios(images):
  cfg = settings.resolve(settings.Settings(method='ratio'))
  params = rounds.init(cfg, jax.random.key(0)).params
  rows = np.concatenate([np.flatnonzero(images.train_y == c)[:4] for c in range(10)])
  x, y = images.train_x[rows], jnp.array(images.train_y[rows])
  found = jax.jit(lambda p: class_ratios.class_weights(cfg, p, x, y))(params)
  assert found.shape == (10,) and (found > 1).all()
  other = jax.jit(lambda p: class_ratios.class_weights(cfg, p, x[::-1], y[::-1]))(params)
  np.testing.assert_allclose(found, other, rtol=1e-3)  # the order of the samples is nothing

  def step(head):  # down the mean loss of class 3: its own logit's weights grow
    means, _ = heads.class_means(y, y == 3, 10)
    return -heads.weighted_gradients(head, jnp.ones((40, 64)), y, means)['kernel'][3]

  assert (step(params['main'])[:, 3] > 0).all() and (step(params['main'])[:, 2] < 0).all()
