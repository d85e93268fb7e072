import math

import numpy as np
import pytest

from moe_jax.analysis import leakage


def test_the_papers_figures():
  # K = 2, N = 16, R = 1 / 8: 2 log2(7) = 5.61 bits per layer; 9 layers leak more than 50.
  assert f'{leakage.lower_bound(16, 2):.2f}' == '5.61'
  assert f'{9 * leakage.lower_bound(16, 2):.1f}' == '50.5'
  for chunk in (512, 2048, 8192):
    assert 9 * leakage.bits_per_token(16, 2, chunk) > 50


@pytest.mark.parametrize(
  'n, k, tokens, want',
  [
    (4, 2, 4, 4 / 4 * math.log2(6)),  # C(4, 2) = 6
    (4, 1, 8, 4 / 8 * math.log2(28)),  # C(8, 2) = 28
    (4, 1, 7, 4 / 7 * math.log2(7)),  # 7 / 4 rounds down to 1: C(7, 1) = 7
    (16, 2, 7, 0.0),  # 14 / 16 rounds down to none
    (3, 3, 5, 0.0),  # every expert takes every token: a single allocation
  ],
)
def test_bits_by_hand(n, k, tokens, want):
  assert leakage.bits_per_token(n, k, tokens) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize('n, k', [(16, 2), (64, 6), (8, 4), (8, 6)])
def test_exceeds_the_bound_wherever_experts_take_whole_tokens(n, k):
  bound = leakage.lower_bound(n, k)
  whole = n // math.gcd(n, k)
  bits = [leakage.bits_per_token(n, k, whole * i) for i in (1, 2, 3, 10, 1000, 100_000)]
  assert all(b > bound for b in bits)
  # It rises to N times the binary entropy of R and never exceeds it.
  r = k / n
  limit = n * -(r * math.log2(r) + (1 - r) * math.log2(1 - r))
  assert bits == sorted(bits) and bits[-1] < limit
  assert bits[-1] == pytest.approx(limit, rel=1e-3)
  assert limit > bound


def test_rounding_can_fall_below_the_bound():
  assert leakage.bits_per_token(16, 2, 7) < leakage.lower_bound(16, 2)


def test_bound_of_dense_and_half_dense_routing():
  assert leakage.lower_bound(4, 4) == -math.inf
  assert leakage.lower_bound(4, 2) == 0


def test_changed_assignments_by_hand():
  before = np.array([[[[0, 1], [2, 3], [1, 4]]], [[[0, 1], [2, 3], [4, 4]]]])  # 2 layers, 1 row
  after = np.array([[[[1, 0], [2, 1], [1, 3]]], [[[0, 4], [2, 3], [3, 4]]]])
  everywhere = np.array([[True, True, True]])
  # Layer 0: tokens 1 and 2 differ, the order in token 0 does not count. Layer 1: tokens 0 and 2.
  assert leakage.changed_assignments(before, after, everywhere) == 4 / 6
  # Without token 2, where the future begins: one of two in each layer.
  assert leakage.changed_assignments(before, after, np.array([[True, True, False]])) == 0.5
  assert leakage.changed_assignments(before, after, np.array([[False, False, True]])) == 1
  assert leakage.changed_assignments(before, before[..., ::-1], everywhere) == 0


def test_every_row_counts_by_its_own_mask():
  before = np.zeros((1, 2, 2, 1), int)
  after = np.array([[[[0], [1]], [[1], [1]]]])
  mask = np.array([[True, True], [True, False]])
  assert leakage.changed_assignments(before, after, mask) == pytest.approx(2 / 3)


def test_bad_input_is_refused():
  idx = np.zeros((1, 2, 3, 1), int)
  with pytest.raises(ValueError, match='no token'):
    leakage.changed_assignments(idx, idx, np.zeros((2, 3), bool))
  with pytest.raises(ValueError, match='do not match'):
    leakage.changed_assignments(idx, idx, np.ones((3, 2), bool))
  with pytest.raises(ValueError, match='do not match'):
    leakage.changed_assignments(idx, idx[:, :1], np.ones((2, 3), bool))
