"""Paired differences by hand, and their verdicts."""

import math

import pytest

from moe_jax import errors
from moe_jax.analysis import paired


def test_interval_by_hand():
  # Mean 2, deviation 1, three seeds: t(0.975, 2) = 4.30265, over the square root of 3.
  found = paired.interval([1.0, 2.0, 3.0])
  half = 4.30265 / math.sqrt(3)
  assert found.mean == 2.0 and found.num_seeds == 3
  assert found.low == pytest.approx(2 - half, abs=1e-4)
  assert found.high == pytest.approx(2 + half, abs=1e-4)
  assert found.covers_zero
  assert paired.interval([1.0, 2.0, 3.0], 0.5).low == pytest.approx(2 - 0.8165 / math.sqrt(3), 1e-3)


def test_pairs_see_what_means_do_not():
  noisy = [1.0, 5.0, 9.0, 2.0]
  better = [value - 0.1 - 0.01 * i for i, value in enumerate(noisy)]
  assert not paired.difference(better, noisy).covers_zero
  assert paired.difference(sorted(better), noisy).covers_zero
  with pytest.raises(ValueError):
    paired.difference([1.0], [1.0, 2.0])


def test_one_seed_decides_nothing():
  found = paired.interval([-3.0])
  assert found.covers_zero and paired.verdict(found, 'lower') == paired.UNDECIDED
  assert found.text(1) == '-3.0 (one seed)'
  with pytest.raises(errors.InputError):
    paired.interval([])


@pytest.mark.parametrize(
  'low, high, direction, margin, want',
  [
    (-0.3, -0.1, 'lower', 0.0, paired.CONFIRMED),
    (-0.3, -0.1, 'higher', 0.0, paired.CONTRADICTED),
    (0.1, 0.3, 'lower', 0.0, paired.CONTRADICTED),
    (0.1, 0.3, 'higher', 0.0, paired.CONFIRMED),
    (-0.1, 0.3, 'lower', 0.0, paired.UNDECIDED),
    (-0.1, 0.0, 'lower', 0.0, paired.UNDECIDED),
    (-0.1, 0.1, 'equal', 0.2, paired.CONFIRMED),
    (-0.1, 0.3, 'equal', 0.2, paired.UNDECIDED),
    (0.1, 0.15, 'equal', 0.2, paired.CONFIRMED),
    (0.25, 0.3, 'equal', 0.2, paired.CONTRADICTED),
    (-0.3, -0.25, 'equal', 0.2, paired.CONTRADICTED),
  ],
)
def test_verdicts(low, high, direction, margin, want):
  found = paired.Interval((low + high) / 2, low, high, 5)
  assert paired.verdict(found, direction, margin) == want


def test_unknown_direction():
  with pytest.raises(ValueError, match='lower'):
    paired.verdict(paired.interval([1.0, 2.0]), 'smaller')


def test_text():
  assert paired.Interval(-0.0123, -0.02, -0.004, 5).text() == '-0.012 [-0.020, -0.004]'
  assert paired.Interval(0.5, 0.25, 0.75, 5).text(2, sign=False) == '0.50 [0.25, 0.75]'
