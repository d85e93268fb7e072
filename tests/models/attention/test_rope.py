import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.config import attention_config
from moe_jax.models.attention import rope

H = 8
RNG = np.random.default_rng(0)
NO_YARN = attention_config.YarnConfig(1.0, 4096, 32.0, 1.0, 1.0, 1.0)
ROPE = attention_config.RopeConfig(100.0, 'half', NO_YARN)
INTERLEAVED = dataclasses.replace(ROPE, layout='interleaved')
Q, K = (jnp.asarray(RNG.normal(size=(1, 1, 2, H)), jnp.float32) for _ in range(2))


def at(x, position, cfg=ROPE):
  """One token x [1, 1, N, H] at this position."""
  return rope.rotate(x, rope.angles(jnp.array([[position]]), H, cfg), cfg)


def test_angles_by_hand():
  # theta^(-2i/H) for i = 0..3 is 1, 100^-.25, 100^-.5 = .1, 100^-.75
  got = rope.angles(jnp.array([[0, 1, 3]]), H, ROPE)[0]
  inv_freq = np.array([1, 100**-0.25, 0.1, 100**-0.75])
  np.testing.assert_allclose(got, np.outer([0, 1, 3], inv_freq), rtol=1e-6)


def test_pairs_turn_by_their_angle():
  x = jnp.array([[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])  # B = 1, L = 2, N = 1, H = 4
  angle = rope.angles(jnp.array([[2, 5]]), 4, ROPE)
  # Dimension 0 pairs with 2 (frequency 1), dimension 1 with 3 (frequency .1).
  want = [[np.cos(2), 0, np.sin(2), 0], [0, -np.sin(0.5), 0, np.cos(0.5)]]
  np.testing.assert_allclose(rope.rotate(x, angle, ROPE)[0, :, 0], want, atol=1e-6)


def test_position_0_is_the_identity_and_norms_are_kept():
  np.testing.assert_array_equal(at(Q, 0), Q)
  for position in (1, 17, 1000):
    turned = at(Q, position)
    assert not np.allclose(turned, Q)
    np.testing.assert_allclose(
      np.linalg.norm(turned, axis=-1), np.linalg.norm(Q, axis=-1), rtol=1e-6
    )


def test_scores_depend_on_the_distance_only():
  def score(m, n):
    return np.asarray((at(Q, m) * at(K, n)).sum(-1))

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


def test_layouts_differ_by_a_permutation_only():
  """Pair i of the interleaved layout is (2i, 2i + 1); its result is in half-split order."""
  x = np.asarray(Q)
  moved = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
  got, want = at(Q, 5, INTERLEAVED), at(jnp.asarray(moved), 5)
  np.testing.assert_array_equal(got, want)
  pair = x[0, 0, 0, 2] + 1j * x[0, 0, 0, 3]  # the second pair turns by theta^(-2/8)
  turned = pair * np.exp(5j * 100**-0.25)
  np.testing.assert_allclose([got[0, 0, 0, 1], got[0, 0, 0, 5]], [turned.real, turned.imag], 1e-5)


def test_interleaved_scores_depend_on_the_distance_only():
  def score(m, n):
    return np.asarray((at(Q, m, INTERLEAVED) * at(K, n, INTERLEAVED)).sum(-1))

  np.testing.assert_allclose(score(9, 4), score(35, 30), atol=1e-4)


# DeepSeek-V2's values: 64 rotated dimensions, 4096 positions stretched 40 times.
V2 = attention_config.RopeConfig(
  10_000.0, 'interleaved', attention_config.YarnConfig(40.0, 4096, 32.0, 1.0, 0.707, 0.707)
)


def test_yarn_constants_of_deepseek_v2():
  assert rope.correction_range(64, V2) == (10, 23)
  plain = rope.inv_freq(64, dataclasses.replace(V2, yarn=NO_YARN))
  np.testing.assert_allclose(plain, 1e4 ** (-np.arange(32) / 32), rtol=1e-6)
  got = rope.inv_freq(64, V2)
  np.testing.assert_array_equal(got[:11], plain[:11])  # ramp 0 up to pair 10
  np.testing.assert_allclose(got[23:], plain[23:] / 40, rtol=1e-6)
  # Pair 15 is 5/13 of the way: (8/13) f + (5/13) f / 40
  np.testing.assert_allclose(got[15], plain[15] * (8 / 13 + 5 / 13 / 40), rtol=1e-6)


def test_yarn_magnitude_and_softmax_scale():
  """Constants of the papers' sheet: m(0.707) = 1.260804, m(1) = 1.368888."""
  assert rope.magnitude(V2) == 1.0
  np.testing.assert_allclose(attention_config.yarn_mscale(40, 0.707), 1.260804, rtol=1e-6)
  np.testing.assert_allclose(attention_config.yarn_mscale(40, 1.0), 1.368888, rtol=1e-6)
  original = dataclasses.replace(V2.yarn, mscale=1.0, mscale_all_dim=0.0)
  magnitude = rope.magnitude(dataclasses.replace(V2, yarn=original))
  np.testing.assert_allclose(magnitude, 0.1 * np.log(40) + 1, rtol=1e-6)  # YaRN's own attention
  mla = attention_config.MLAConfig(0, 512, 128, 64, 128)
  scales = []
  for mscale in (0.707, 1.0):
    yarn = dataclasses.replace(V2.yarn, mscale=mscale, mscale_all_dim=mscale)
    cfg = attention_config.AttentionConfig(
      'mla', 'reference', 1, 1, dataclasses.replace(V2, yarn=yarn), mla, 0
    )
    scales.append(cfg.softmax_scale)
  np.testing.assert_allclose(scales, [0.1147214, 0.1352338], rtol=1e-6)


def test_a_stretched_rotation_multiplies_by_its_magnitude():
  yarn = attention_config.YarnConfig(4.0, 16, 32.0, 1.0, 1.0, 0.0)
  stretched = dataclasses.replace(ROPE, yarn=yarn)
  np.testing.assert_allclose(at(Q, 0, stretched), Q * (0.1 * np.log(4) + 1), rtol=1e-6)


def test_yarns_ramp_lies_between_the_first_and_the_last_pair():
  """dim ln(4096 / 2 pi turns) / (2 ln theta): the pair that turns that often, cut at both ends."""

  def borders(fast, slow):
    yarn = attention_config.YarnConfig(4.0, 4096, fast, slow, 1.0, 1.0)
    return rope.correction_range(H, attention_config.RopeConfig(100.0, 'half', yarn))

  # Pairs of 200, 20, 1e-6 and 1e6 turns: 1.02, 3.02, 17.6 and -6.4.
  assert borders(200.0, 20.0) == (1, 4)
  assert borders(200.0, 1e-6) == (1, H - 1)
  assert borders(1e6, 20.0) == (0, 4)
  assert borders(1e6, 1e6) == (0, 0.001)
