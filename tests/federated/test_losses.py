import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.federated import losses


def test_of_two_classes_by_hand():
  # Logits log 3 and 0: probabilities 3/4 and 1/4.
  logits = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
  labels, weights = jnp.array([0, 1]), jnp.array([2.0, 5.0])
  plain = np.log([4 / 3, 4.0])
  by_kind = {
    'cross_entropy': plain,
    'focal': plain * [1 / 16, 9 / 16],  # (1 - p)^2
    'ratio': plain * [2, 5],
  }
  for kind, expected in by_kind.items():
    np.testing.assert_allclose(losses.loss(kind, logits, labels, weights, 2.0), expected, rtol=1e-5)
  with pytest.raises(ValueError, match="kind='hinge'"):
    losses.loss('hinge', logits, labels, weights, 2.0)
