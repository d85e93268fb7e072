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


@pytest.mark.parametrize('direction', paired.DIRECTIONS)
@pytest.mark.parametrize('odd', [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_decide_nothing(odd, direction):
  for values in ([odd], [odd, 1.0], [1.0, odd, -odd], [odd, odd]):
    found = paired.interval(values)
    assert math.isnan(found.mean) and math.isnan(found.low) and math.isnan(found.high)
    assert found.num_seeds == len(values) and found.covers_zero
    assert paired.verdict(found, direction, 0.1) == paired.UNDECIDED
    assert paired.p_value(values, direction, 0.1) == 1.0
    assert paired.seeds_that_decide(values, 0.1) is None
    assert found.text() == found.text(1, sign=False) == 'not finite'


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


@pytest.mark.parametrize('direction, margin', [('lower', 0.0), ('equal', 0.5), ('equal', 0.05)])
@pytest.mark.parametrize('shift', [0.0, 0.08, 0.3, 0.42, 0.6])
def test_p_value_is_the_level_at_which_the_verdict_changes(direction, margin, shift):
  values = [shift + d for d in (-0.1, 0.02, 0.1, -0.03, 0.01)]
  p = paired.p_value(values, direction, margin)
  for confidence, decided in ((1 - p - 1e-6, True), (1 - p + 1e-6, False)):
    if 0 < confidence < 1:
      verdict = paired.verdict(paired.interval(values, confidence), direction, margin)
      assert (verdict != paired.UNDECIDED) == decided


def test_p_value_by_hand():
  # Mean 2, deviation 1, three seeds: t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom.
  assert paired.p_value([1.0, 2.0, 3.0], 'lower') == pytest.approx(0.07418, abs=1e-5)
  assert paired.p_value([-3.0], 'lower') == 1.0
  assert paired.p_value([0.0, 0.0], 'lower') == 1.0 and paired.p_value([1.0, 1.0], 'lower') == 0.0


def test_holm_by_hand():
  # Sorted 0.01, 0.02, 0.03, 0.9 times 4, 3, 2, 1: 0.04, 0.06, then never less.
  assert paired.holm([0.03, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
  assert paired.holm([0.9, 0.9]) == [1.0, 1.0] and paired.holm([]) == []
  verdicts = [paired.CONFIRMED, paired.UNDECIDED, paired.CONTRADICTED, paired.CONFIRMED]
  assert paired.corrected(verdicts, [0.03, 0.9, 0.01, 0.02]) == [
    *(paired.UNDECIDED, paired.UNDECIDED, paired.CONTRADICTED, paired.UNDECIDED)
  ]


def test_seeds_that_decide():
  # A mean of one deviation takes 10 seeds for a power of 80 %, of half a deviation 34 (tables of
  # the t test say 10 and 34).
  spread = [-1.0, 0.0, 1.0]
  assert paired.seeds_that_decide([v + 1 for v in spread]) == 10
  assert paired.seeds_that_decide([v - 1 for v in spread]) == 10
  assert paired.seeds_that_decide([v + 0.5 for v in spread]) == 34
  # Equality within 1.2: what is left of the margin counts.
  assert paired.seeds_that_decide([v + 0.2 for v in spread], 1.2) == 10
  assert paired.seeds_that_decide([1.0, 1.0]) == 2
  assert paired.seeds_that_decide([1.0]) is None
  assert paired.seeds_that_decide(spread) is None
  assert paired.seeds_that_decide([v + 0.001 for v in spread]) is None
