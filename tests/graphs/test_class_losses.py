import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.graphs import class_losses

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 1.0]])
LABELS = np.array([0, 1])
SIZES = np.array([30, 10, 20])


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def bce(q, right):
  return np.where(right == 1, -np.log(q), -np.log(1 - q))


def test_the_losses_by_their_formulas():
  right = np.eye(3)[LABELS]
  cross_entropy = -np.log(softmax(LOGITS)[[0, 1], LABELS])
  mean_over_size = 20 / SIZES[LABELS]
  sigmoid = 1 / (1 + np.exp(-LOGITS))
  true_side = np.where(right == 1, sigmoid, 1 - sigmoid)
  focal = (bce(sigmoid, right) * (1 - true_side) ** 2).sum(1) * mean_over_size
  effective = (1 - 0.9999) / (1 - 0.9999**SIZES)
  effective = effective / effective.sum() * 3
  balanced = bce(softmax(LOGITS), right).mean(1) * effective[LABELS]
  for kind, want in {
    'cross_entropy': cross_entropy,
    're_weight': cross_entropy * mean_over_size,
    'focal': focal,
    'class_balanced': balanced,
  }.items():
    found = class_losses.per_node(kind, jnp.asarray(LOGITS, jnp.float32), LABELS, SIZES)
    np.testing.assert_allclose(found, want, rtol=2e-5, err_msg=kind)


@pytest.mark.parametrize('kind', class_losses.LOSSES)
def test_equal_classes_have_weight_one_and_sure_logits_are_finite(kind):
  np.testing.assert_allclose(class_losses.class_weights(kind, jnp.array([7, 7])), [1, 1], rtol=1e-5)
  sure = jnp.array([[60.0, -60.0]])
  for label in (0, 1):
    found = class_losses.per_node(kind, sure, jnp.array([label]), jnp.array([5, 5]))
    assert np.isfinite(found).all() and (found[0] < 1e-5) == (label == 0)
