import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import losses

LOGITS = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]]))


def test_cross_entropy_by_hand():
  cross_entropy, z = losses.next_token(LOGITS, jnp.array([[1, 2, -1]]))
  # -ln .25 - ln .7 and nothing for the last; the probabilities sum to 1, so log Z = 0.
  np.testing.assert_allclose(cross_entropy, -np.log(0.25) - np.log(0.7), rtol=1e-6)
  np.testing.assert_allclose(z, 0, atol=1e-12)


def test_z_loss_by_hand():
  shifted = LOGITS + jnp.array([[[2.0], [-1.0], [5.0]]])
  cross_entropy, z = losses.next_token(shifted, jnp.array([[1, 2, -1]]))
  # log Z is the shift: 2^2 + 1^2; the shift does not change the cross-entropy.
  np.testing.assert_allclose(z, 5.0, rtol=1e-6)
  np.testing.assert_allclose(cross_entropy, -np.log(0.25) - np.log(0.7), rtol=1e-6)


def test_uniform_logits_cost_log_v_each():
  cross_entropy, _ = losses.next_token(jnp.zeros((2, 5, 32)), jnp.zeros((2, 5), jnp.int32))
  np.testing.assert_allclose(cross_entropy, 10 * np.log(32), rtol=1e-6)


def test_no_targets_cost_nothing():
  assert losses.next_token(LOGITS, jnp.full((1, 3), -1)) == (0.0, 0.0)


def test_gradient_is_probability_minus_target_and_0_without_target():
  grad = jax.grad(lambda x: losses.next_token(x, jnp.array([[1, 2, -1]]))[0])(LOGITS)
  want = [[[0.5, -0.75, 0.25], [0.1, 0.2, -0.3], [0, 0, 0]]]
  np.testing.assert_allclose(grad, want, atol=1e-6)


def test_large_logits_stay_finite():
  cross_entropy, z = losses.next_token(jnp.array([[[1e4, 0.0]]]), jnp.array([[1]]))
  np.testing.assert_allclose((cross_entropy, z), (1e4, 1e8), rtol=1e-6)
