import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import balance

E, K = 4, 2
# Two sequences of 4 tokens. The second has two real tokens; the others carry the index E = 4.
IDX = np.array([[[0, 1], [0, 2], [0, 1], [3, 0]], [[2, 3], [3, 2], [4, 4], [4, 4]]], np.int32)
NUM_TOKENS = np.array([4, 2], np.int32)
LOAD = [[4, 2, 1, 1], [0, 0, 2, 2]]


def test_expert_load_counts_every_choice_of_real_tokens():
  load = balance.expert_load(jnp.array(IDX), E)
  np.testing.assert_array_equal(load, LOAD)
  assert load.dtype == jnp.int32


def test_loads_sum_to_real_tokens_times_k():
  rng = np.random.default_rng(0)
  # Different experts per token, and about a third of the tokens is padding.
  idx = np.argsort(rng.random((3, 20, 8)), axis=-1)[..., :3].astype(np.int32)
  real = rng.random((3, 20)) < 2 / 3
  idx[~real] = 8
  load = np.asarray(balance.expert_load(jnp.array(idx), 8))
  np.testing.assert_array_equal(load.sum(-1), real.sum(1) * 3)
  np.testing.assert_array_equal(load.sum(0), np.bincount(idx.ravel(), minlength=9)[:8])


def test_expert_load_without_a_batch_axis():
  np.testing.assert_array_equal(balance.expert_load(jnp.array(IDX[0]), E), LOAD[0])


def loss_of(scores, idx, num_tokens):
  load = balance.expert_load(jnp.array(idx), scores.shape[-1])
  return balance.expert_level_loss(jnp.array(scores), load, jnp.array(num_tokens), idx.shape[-1])


def test_loss_is_1_at_perfect_balance():
  idx = np.array([[[0, 1], [2, 3], [1, 2], [3, 0]]], np.int32)  # every expert twice
  scores = np.random.default_rng(0).dirichlet(np.ones(E), size=(1, 4)).astype(np.float32)
  # f_i = E / (K T) * 2 = 4 / 8 * 2 = 1, so that sum f_i P_i = sum P_i = 1 whatever the scores.
  np.testing.assert_allclose(loss_of(scores, idx, [4]), [1.0], rtol=1e-6)


def test_loss_is_e_over_k_when_all_tokens_pick_the_same_experts():
  idx = np.tile(np.array([0, 1], np.int32), (1, 4, 1))
  scores = np.tile(np.array([0.5, 0.5, 0, 0], np.float32), (1, 4, 1))
  # f = (4 / 8 * 4, same, 0, 0) = (2, 2, 0, 0); P = (.5, .5, 0, 0); sum = 2 = E / K
  np.testing.assert_allclose(loss_of(scores, idx, [4]), [E / K], rtol=1e-6)


def test_loss_per_sequence_by_hand_and_padding_not_counted():
  scores = np.zeros((2, 4, E), np.float32)
  scores[0] = [0.4, 0.3, 0.2, 0.1]
  scores[1, :2] = [[0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.2, 0.6]]
  # Sequence 0, T = 4: f = 4 / 8 * (4, 2, 1, 1) = (2, 1, .5, .5);
  #   sum f P = .8 + .3 + .1 + .05 = 1.25
  # Sequence 1, T = 2: f = 4 / 4 * (0, 0, 2, 2); P = (.1, .1, .3, .5); sum f P = .6 + 1 = 1.6
  want = [1.25, 1.6]
  np.testing.assert_allclose(loss_of(scores, IDX, NUM_TOKENS), want, rtol=1e-6)
  # The same two tokens alone, without the padding.
  np.testing.assert_allclose(loss_of(scores[1:, :2], IDX[1:, :2], [2]), want[1:], rtol=1e-6)


def test_loss_of_an_empty_sequence_is_0():
  idx = np.full((1, 4, K), E, np.int32)
  np.testing.assert_array_equal(loss_of(np.zeros((1, 4, E), np.float32), idx, [0]), [0.0])


def test_gradient_is_the_frequency_over_the_tokens():
  """f carries no gradient: d loss / d s_{i,t} = f_i / T, the same for all tokens."""
  scores = np.random.default_rng(0).dirichlet(np.ones(E), size=(2, 4)).astype(np.float32)
  grad = jax.grad(lambda s: loss_of(s, IDX, NUM_TOKENS).sum())(jnp.array(scores))
  frequency = np.array(LOAD) * E / K / NUM_TOKENS[:, None]
  want = np.broadcast_to((frequency / NUM_TOKENS[:, None])[:, None], scores.shape)
  np.testing.assert_allclose(grad, want, rtol=1e-6)


def test_a_soft_load_would_carry_no_gradient_either():
  scores = jnp.full((1, 4, E), 0.25)
  loss = lambda load: balance.expert_level_loss(scores, load, jnp.array([4]), K).sum()
  np.testing.assert_array_equal(jax.grad(loss)(jnp.array(LOAD[:1], jnp.float32)), np.zeros((1, E)))


@pytest.mark.parametrize(
  'counts, want',
  [
    ((7, 3, 1, 5), 0.75),  # mean 4, (7 - 4) / 4
    ((4, 4, 4, 4), 0.0),
    ((0, 16, 0, 0), 3.0),  # E - 1
    ((0, 0, 0, 0), 0.0),  # nothing routed
    ((10**9, 10**9, 0, 0), 1.0),  # int32 sums would overflow
  ],
)
def test_max_vio_by_hand(counts, want):
  for load in (np.array(counts), jnp.array(counts, jnp.float32), np.array(counts, np.float64)):
    assert float(balance.max_vio(load)) == pytest.approx(want, rel=1e-6)


def test_max_vio_of_numpy_and_jax_agree_per_layer():
  load = np.random.default_rng(0).integers(0, 50, size=(3, 5, 8))
  load[1, 2] = 0
  on_host, on_device = balance.max_vio(load), balance.max_vio(jnp.array(load))
  assert isinstance(on_host, np.ndarray) and isinstance(on_device, jax.Array)
  assert on_host.shape == (3, 5)
  np.testing.assert_allclose(on_host, on_device, rtol=1e-6)
