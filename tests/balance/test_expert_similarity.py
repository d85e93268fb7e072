import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import expert_similarity


def experts(layers, e, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  shapes = ((layers, e, 16, 2, 24), (layers, e, 24, 16))
  return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def of_vectors(*vectors):
  """One layer of experts whose weights are these 3-vectors: D = F = 1."""
  vectors = np.array(vectors, np.float32)
  return vectors[None, :, None, :2, None], vectors[None, :, 2:, None]


def test_identical_experts():
  gate_up, down = (np.repeat(a[:, :1], 5, axis=1) for a in experts(2, 1))
  np.testing.assert_allclose(expert_similarity.expert_similarity(gate_up, down), [1, 1], rtol=1e-6)
  # Length does not count.
  scale = np.arange(1, 6, dtype=np.float32)[:, None, None]
  found = expert_similarity.expert_similarity(gate_up * scale[..., None], down * scale)
  np.testing.assert_allclose(found, [1, 1], rtol=1e-6)


def test_random_experts_are_at_right_angles():
  found = expert_similarity.expert_similarity(*experts(3, 8))
  # A cosine of 1152 random numbers varies by 1 / 34; the mean of 28 pairs by about 1 / 180.
  assert found.shape == (3,) and found.dtype == jnp.float32
  assert (np.abs(found) < 0.03).all()


def test_by_hand():
  # Cosines: (1, 0, 0).(0, 0, 2) = 0; (1, 0, 0).(3, 0, 4) = 3 / 5; (0, 0, 2).(3, 0, 4) = 8 / 10.
  found = expert_similarity.expert_similarity(*of_vectors((1, 0, 0), (0, 0, 2), (3, 0, 4)))
  np.testing.assert_allclose(found, [(0 + 0.6 + 0.8) / 3], rtol=1e-6)
  found = expert_similarity.expert_similarity(*of_vectors((1, 2, 2), (-1, -2, -2)))
  np.testing.assert_allclose(found, [-1], rtol=1e-6)


def test_against_flattened_vectors():
  gate_up, down = experts(2, 6, seed=1)
  gate_up[:, 1] += gate_up[:, 0]
  flat = np.concatenate([a.reshape(2, 6, -1) for a in (gate_up, down)], axis=-1).astype(np.float64)
  flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
  cosine = np.einsum('lep,lgp->leg', flat, flat)
  want = [cosine[i][np.triu_indices(6, 1)].mean() for i in range(2)]
  found = expert_similarity.expert_similarity(gate_up, down)
  np.testing.assert_allclose(found, want, rtol=1e-4)


def test_bfloat16_weights_are_summed_in_float32():
  gate_up, down = (jnp.asarray(a, jnp.bfloat16) for a in experts(1, 4))
  want = expert_similarity.expert_similarity(gate_up.astype(jnp.float32), down.astype(jnp.float32))
  np.testing.assert_array_equal(expert_similarity.expert_similarity(gate_up, down), want)


@pytest.mark.parametrize('e', [1, 2])
def test_a_single_expert_and_experts_of_zeros(e):
  zeros = [np.zeros_like(a) for a in experts(2, e)]
  want = [1, 1] if e == 1 else [0, 0]
  np.testing.assert_array_equal(expert_similarity.expert_similarity(*zeros), want)


def test_under_jit():
  gate_up, down = experts(2, 3)
  want = expert_similarity.expert_similarity(gate_up, down)
  np.testing.assert_allclose(
    jax.jit(expert_similarity.expert_similarity)(gate_up, down), want, rtol=1e-5
  )
