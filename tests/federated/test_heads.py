import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.federated import heads, losses

RNG = np.random.default_rng(0)
HEAD = {'kernel': jnp.array(RNG.normal(size=(3, 4))), 'bias': jnp.array(RNG.normal(size=4))}
FEATURES = jnp.array(RNG.normal(size=(6, 3)))
LABELS = jnp.array([0, 2, 2, 0, 1, 2])
REAL = jnp.array([True, True, True, True, True, False])


@jax.jit
@jax.grad
def mean_gradient(head, rows):
  return losses.cross_entropy(heads.logits(head, FEATURES[rows]), LABELS[rows]).mean()


def test_class_gradients_are_those_of_the_mean_losses():
  means, counts = heads.class_means(LABELS, REAL, 4)
  assert counts.tolist() == [2, 1, 2, 0]
  found = jax.jit(heads.weighted_gradients)(HEAD, FEATURES, LABELS, means)
  for c, rows in enumerate(([0, 3], [4, 4], [1, 2])):
    expected = mean_gradient(HEAD, np.array(rows))
    for name, gradient in found.items():
      np.testing.assert_allclose(gradient[c], expected[name], rtol=2e-5, atol=1e-6)
  assert not found['kernel'][3].any() and not found['bias'][3].any()


def some(number: int, shift: float = 0.0) -> heads.Head:
  kernel, bias = np.arange(number * 12.0).reshape(number, 3, 4), np.arange(number * 4.0)
  return {'kernel': kernel + shift, 'bias': bias.reshape(number, 4) + shift}


def test_every_class_counts_the_same():
  real = jax.tree.map(lambda w: w[0], some(1, 7.0))
  prototypes = some(4)
  mine, known = np.array([True, False, True, False]), np.array([True, True, True, False])
  balanced = jax.jit(heads.balanced_gradient)
  found, is_there = balanced(real, mine, prototypes, known)
  for name in real:  # class 1 is the only one that is known and not mine: (2 real + 2 p_1) / 4
    np.testing.assert_allclose(found[name], (2 * real[name] + 2 * prototypes[name][1]) / 4)
  assert is_there
  none = np.zeros(4, bool)
  found, _ = balanced(jax.tree.map(np.zeros_like, real), none, prototypes, known)
  for name in real:  # L is empty: the mean prototype alone
    np.testing.assert_allclose(found[name], prototypes[name][:3].mean(axis=0), rtol=1e-6)
  found, is_there = balanced(real, mine, prototypes, mine)
  for name in real:  # no prototype outside of L: the real gradient alone, not a share of it
    np.testing.assert_array_equal(found[name], real[name].astype(np.float32))
  assert is_there and not balanced(real, none, prototypes, none)[1]


def test_the_correction_has_the_norm_of_the_local_gradient_in_each_tensor():
  local, direction = (jax.tree.map(lambda w: w[0], some(1, shift)) for shift in (1.0, -3.0))
  corrected = jax.jit(heads.corrected)
  found = corrected(HEAD, direction, local, 0.02)
  for name in HEAD:
    moved = np.asarray(HEAD[name]) - np.asarray(found[name])
    np.testing.assert_allclose(np.linalg.norm(moved), 0.02 * np.linalg.norm(local[name]), rtol=1e-4)
    np.testing.assert_allclose(
      moved / np.linalg.norm(moved), direction[name] / np.linalg.norm(direction[name]), atol=1e-4
    )
  nothing = jax.tree.map(np.zeros_like, direction)
  still = corrected(HEAD, nothing, local, 0.02)
  assert all((still[name] == HEAD[name]).all() for name in HEAD)
