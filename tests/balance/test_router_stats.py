import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import router_stats
from tests.balance import routed


def test_sums_by_hand():
  got = routed.case_a()
  np.testing.assert_array_equal(got.num_tokens, [3])
  np.testing.assert_array_equal(got.load, [[2, 2, 0, 2]])
  np.testing.assert_array_equal(got.first_load, [[2, 0, 0, 1]])
  np.testing.assert_array_equal(got.sent, [[3, 2]])
  np.testing.assert_allclose(got.score, [[1.0, 0.65, 0.5, 0.85]], **routed.EXACT)
  np.testing.assert_allclose(got.prob, got.score, **routed.EXACT)  # softmax scores sum to 1
  np.testing.assert_allclose(got.squared_log_z, [1 + 4 + 1], **routed.EXACT)  # c^2
  assert {a.dtype for a in got[:4]} == {jnp.dtype('int32')}
  got = routed.case_b()
  np.testing.assert_array_equal(got.load, [[2, 1, 2, 1, 2]])
  np.testing.assert_array_equal(got.first_load, [[1, 1, 2, 0, 0]])
  np.testing.assert_array_equal(got.sent, [[2, 3, 2]])
  np.testing.assert_allclose(got.score, [[1.6, 1.7, 1.1, 1.2, 0.9]], **routed.EXACT)
  # Divided by the tokens' sums: (.4 .2 .1 .2 .1) + (.2 .6 .1 .1 0) + (.2 x 5) + (.1 .2 .3 .2 .2)
  np.testing.assert_allclose(got.prob, [[0.9, 1.2, 0.7, 0.7, 0.5]], **routed.EXACT)


# Two sequences of 4 tokens. The second has two real tokens; the others carry the index E = 4.
IDX = np.array([[[0, 1], [0, 2], [0, 1], [3, 0]], [[2, 3], [3, 2], [4, 4], [4, 4]]], np.int32)
LOAD = [[4, 2, 1, 1], [0, 0, 2, 2]]


def test_expert_load_counts_every_choice_of_real_tokens():
  load = router_stats.expert_load(jnp.array(IDX), 4)
  np.testing.assert_array_equal(load, LOAD)
  assert load.dtype == jnp.int32
  np.testing.assert_array_equal(router_stats.expert_load(jnp.array(IDX[0]), 4), LOAD[0])


def test_loads_sum_to_real_tokens_times_k():
  rng = np.random.default_rng(0)
  # Different experts per token, and about a third of the tokens is padding.
  idx = np.argsort(rng.random((3, 20, 8)), axis=-1)[..., :3].astype(np.int32)
  real = rng.random((3, 20)) < 2 / 3
  idx[~real] = 8
  load = np.asarray(router_stats.expert_load(jnp.array(idx), 8))
  np.testing.assert_array_equal(load.sum(-1), real.sum(1) * 3)
  np.testing.assert_array_equal(load.sum(0), np.bincount(idx.ravel(), minlength=9)[:8])


def test_by_device_fills_the_last_one_up():
  got = router_stats.by_device(jnp.arange(5.0), 3, -1.0)
  np.testing.assert_array_equal(got, [[0, 1], [2, 3], [4, -1]])


@pytest.mark.parametrize(
  'num_devices, want', [(1, [[25]]), (2, [[13, 12]]), (3, [[10, 9, 6]]), (5, [[7, 3, 3, 6, 6]])]
)
def test_device_load_by_hand(num_devices, want):
  load = np.array([[7, 3, 3, 6, 6]])  # blocks of 5; 3 + 2; 2 + 2 + 1; 1
  np.testing.assert_array_equal(router_stats.device_load(load, num_devices), want)


@pytest.mark.parametrize(
  'counts, want',
  [
    ((7, 3, 1, 5), 0.75),  # mean 4, (7 - 4) / 4
    ((4, 4, 4, 4), 0.0),
    ((0, 16, 0, 0), 3.0),  # E - 1
    ((0, 0, 0, 0), 0.0),  # nothing routed
    ((10**9, 10**9, 10**9, 0), 1 / 3),  # int32 sums would overflow
  ],
)
def test_max_vio_by_hand(counts, want):
  arrays = (np.array(counts), np.array(counts, np.float64), jnp.array(counts, jnp.int32))
  for load in (*arrays, jnp.array(counts, jnp.float32)):
    assert float(router_stats.max_vio(load)) == pytest.approx(want, rel=1e-6)


def test_max_vio_of_numpy_and_jax_agree_per_layer():
  load = np.random.default_rng(0).integers(0, 50, size=(3, 5, 8))
  load[1, 2] = 0
  on_host, on_device = router_stats.max_vio(load), router_stats.max_vio(jnp.array(load))
  assert isinstance(on_host, np.ndarray) and isinstance(on_device, jax.Array)
  assert on_host.shape == (3, 5)
  np.testing.assert_allclose(on_host, on_device, rtol=1e-6)
