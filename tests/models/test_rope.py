import jax.numpy as jnp
import numpy as np

from moe_jax.models import rope

THETA, H = 100.0, 8
RNG = np.random.default_rng(0)
Q, K = (jnp.asarray(RNG.normal(size=(1, 1, 2, H)), jnp.float32) for _ in range(2))


def at(x, position):
  """One token x [1, 1, N, H] at this position."""
  return rope.rotate(x, rope.angles(jnp.array([[position]]), H, THETA))


def test_angles_by_hand():
  # theta^(-2i/H) for i = 0..3 is 1, 100^-.25, 100^-.5 = .1, 100^-.75
  got = rope.angles(jnp.array([[0, 1, 3]]), H, THETA)[0]
  inv_freq = np.array([1, 100**-0.25, 0.1, 100**-0.75])
  np.testing.assert_allclose(got, np.outer([0, 1, 3], inv_freq), rtol=1e-6)


def test_pairs_turn_by_their_angle():
  x = jnp.array([[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])  # B = 1, L = 2, N = 1, H = 4
  angle = rope.angles(jnp.array([[2, 5]]), 4, THETA)
  # Dimension 0 pairs with 2 (frequency 1), dimension 1 with 3 (frequency .1).
  want = [[np.cos(2), 0, np.sin(2), 0], [0, -np.sin(0.5), 0, np.cos(0.5)]]
  np.testing.assert_allclose(rope.rotate(x, angle)[0, :, 0], want, atol=1e-6)


def test_position_0_is_the_identity_and_norms_are_kept():
  np.testing.assert_array_equal(at(Q, 0), Q)
  for position in (1, 17, 1000):
    turned = at(Q, position)
    assert not np.allclose(turned, Q)
    np.testing.assert_allclose(
      np.linalg.norm(turned, axis=-1), np.linalg.norm(Q, axis=-1), rtol=1e-6
    )


def test_scores_depend_on_the_distance_only():
  score = lambda m, n: np.asarray((at(Q, m) * at(K, n)).sum(-1))
  # Angles of a few hundred radians are exact to about 2e-5 in float32.
  np.testing.assert_allclose(score(3, 1), score(203, 201), atol=2e-4)
  np.testing.assert_allclose(score(5, 5), (Q * K).sum(-1), atol=1e-5)
  assert not np.allclose(score(3, 1), score(4, 1), atol=1e-2)


def test_dtype_is_kept_and_the_rotation_is_in_float32():
  x = Q.astype(jnp.bfloat16)
  got = at(x, 301)
  assert got.dtype == jnp.bfloat16
  wide = at(x.astype(jnp.float32), 301).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, wide)
