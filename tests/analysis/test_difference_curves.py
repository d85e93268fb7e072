"""Difference against tokens: windows, bands, crossovers and verdicts of constructed curves."""

import dataclasses
import math

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis import difference_curves, paired
from tests import tiny

SPREAD = np.asarray([-1.0, 0.0, 1.0])[:, None]  # three seeds; the interval is +- 2.484 of a unit


def made(mean, noise=0.001, tokens=None):
  """A curve of three seeds about a mean."""
  mean = np.asarray(mean, float)
  at = np.arange(1, len(mean) + 1) * 1e6 if tokens is None else np.asarray(tokens, float)
  return difference_curves.Curve(at, mean + noise * SPREAD, at[-1])


def test_windows_average_pairs_and_leave_out_what_is_not_finite():
  values = np.asarray([[1.0, 2.0, 3.0, np.nan, 5.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
  baseline = np.asarray([[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
  found = difference_curves.curve([1, 2, 3, 4, 5], values, baseline, num_windows=2)
  np.testing.assert_array_equal(found.tokens, [1.0, 10 / 3])  # of 1, and of 2, 3, 5
  np.testing.assert_allclose(found.differences, [[1.0, 10 / 3], [1.0, 4 / 3]])
  every = difference_curves.curve([1, 2, 3, 4, 5], values, baseline, num_windows=4)
  np.testing.assert_array_equal(every.tokens, [1, 2, 3, 5])


def test_windows_end_at_squares():
  found = difference_curves.curve(np.arange(1, 301), np.ones((1, 300)), np.zeros((1, 300)), 10)
  ends = [0, 3, 12, 27, 48, 75, 108, 147, 192, 243, 300]
  want = [np.arange(a + 1, b + 1).mean() for a, b in zip(ends, ends[1:])]
  np.testing.assert_allclose(found.tokens, want)


def test_a_verdict_is_of_the_last_step_not_of_the_middle_of_the_last_window():
  at = np.arange(1, 301) * 10_240  # 3.072M tokens; the last window's mean is at 2.98M
  moving = -0.1 + 0.2 * np.log2(at / at[-1])
  values = moving + np.asarray([[-0.001], [0.0], [0.001]])
  found = difference_curves.curve(at, values, np.zeros((3, 300)))
  assert found.end == 3_072_000 and found.tokens[-1] < 3e6
  assert difference_curves.outcome(found, 'lower').end.mean == pytest.approx(-0.1, abs=1e-3)
  assert difference_curves.sentence(found, 'lower').startswith('lower at 3.07M tokens: -0.100 [')
  values[1, -1] = np.nan  # as of a run that diverged in its last step
  assert difference_curves.curve(at, values, np.zeros((3, 300))).end == 299 * 10_240


def test_no_pairs_are_refused():
  with pytest.raises(ValueError, match='both'):
    difference_curves.curve([1, 2], np.ones((2, 2)), np.ones((1, 2)))
  with pytest.raises(errors.InputError, match='no logged step'):
    difference_curves.curve([1.0], [[np.nan]], [[1.0]])


def test_band_by_hand():
  (one,) = difference_curves.band(made([0.5], noise=0.1))
  half = 4.30265 * 0.1 / math.sqrt(3)  # t(0.975, 2), deviation 0.1, three seeds
  assert one.mean == pytest.approx(0.5) and one.high == pytest.approx(0.5 + half, abs=1e-5)


def test_crossover_and_its_interval():
  # Zero between 3M (+0.1) and 4M (-0.3), a quarter of the way. With noise 0.05 the band is +-0.124:
  # it leaves zero at 2M for the last time, and is below zero from 4M on.
  found = difference_curves.crossover(made([0.4, 0.3, 0.1, -0.3, -0.4], noise=0.05))
  assert found == difference_curves.Crossover(pytest.approx(3.25e6), 2e6, 4e6, True)
  assert found.text() == '3.25M tokens [2.00M, 4.00M]'
  upwards = difference_curves.crossover(made([-0.4, -0.3, -0.1, 0.3, 0.4], noise=0.05))
  assert upwards == (pytest.approx(3.25e6), 2e6, 4e6, False)


def test_the_last_of_several_crossovers_with_open_ends():
  found = difference_curves.crossover(made([0.1, -0.1, 0.1, -0.1], noise=1.0))
  assert found == (pytest.approx(3.5e6), 0.0, math.inf, True)
  assert found.text() == '3.50M tokens [the start, not bounded]'


def test_arms_that_have_not_parted_do_not_cross():
  assert difference_curves.crossover(made([0.0, 0.0, -0.1, -0.2], noise=0.0)) is None
  through = difference_curves.crossover(made([0.1, 0.0, -0.1], noise=0.0))
  assert through == (pytest.approx(2e6), 1e6, 3e6, True)


def logarithmic(end, per_doubling, num=30):
  """A difference that is `end` at the last token and moves by `per_doubling` with log2(tokens)."""
  at = np.arange(1, num + 1) * 1e6
  return made(end + per_doubling * np.log2(at / at[-1]), tokens=at)


@pytest.mark.parametrize(
  'end, per_doubling, direction, margin, verdict',
  [
    (-0.10, 0.0, 'lower', 0.0, paired.CONFIRMED),
    (-0.10, -0.05, 'lower', 0.0, paired.CONFIRMED),  # moves away from zero
    (-0.10, 0.05, 'lower', 0.0, paired.CONFIRMED),  # half-way to zero after a doubling
    (-0.10, 0.098, 'lower', 0.0, difference_curves.NOT_YET),  # covers zero after one
    (-0.10, 0.30, 'lower', 0.0, difference_curves.NOT_YET),  # the other sign after one
    (0.10, -0.30, 'lower', 0.0, difference_curves.NOT_YET),
    (0.0, 0.0, 'lower', 0.0, paired.UNDECIDED),
    (0.0, -0.05, 'lower', 0.0, difference_curves.NOT_YET),  # covers zero now, but not for long
    (0.01, 0.0, 'equal', 0.05, paired.CONFIRMED),
    (0.01, 0.06, 'equal', 0.05, difference_curves.NOT_YET),
    (0.10, 0.05, 'equal', 0.05, paired.CONTRADICTED),
  ],
)
def test_outcomes(end, per_doubling, direction, margin, verdict):
  found = difference_curves.outcome(logarithmic(end, per_doubling), direction, margin)
  assert found.verdict == verdict and found.moves == (verdict == difference_curves.NOT_YET)
  assert found.end.mean == pytest.approx(end, abs=1e-9)
  assert found.slope.mean == pytest.approx(per_doubling, abs=1e-9)


def test_what_is_graded_may_be_in_another_unit():
  held_out = paired.Interval(0.02, -0.01, 0.05, 5)
  slope = paired.Interval(-0.04, -0.05, -0.03, 5)
  assert not difference_curves.still_moves(held_out, slope, 'lower')  # -0.02 covers zero as well
  assert difference_curves.still_moves(held_out, difference_curves.scaled(slope, 2.0), 'lower')
  assert difference_curves.scaled(slope, 2.0) == paired.Interval(-0.08, -0.1, -0.06, 5)


def test_only_the_last_third_counts():
  early = logarithmic(-0.1, 0.0)
  early.differences[:, :20] += 5.0  # up to two thirds of the tokens
  assert difference_curves.outcome(early, 'lower').verdict == paired.CONFIRMED
  late = logarithmic(-0.1, 0.0)
  late.differences[:, 20] += 1.0
  assert difference_curves.outcome(late, 'lower').slope.mean < -0.1


def test_a_slope_that_seeds_do_not_agree_on_is_none():
  at = np.arange(1, 31) * 1e6
  slopes = np.asarray([-1.0, 0.0, 1.3])[:, None] * np.log2(at / at[-1])
  found = difference_curves.outcome(
    difference_curves.Curve(at, slopes - 0.1 - 0.01 * SPREAD, at[-1]), 'lower'
  )
  assert found.slope.covers_zero and not found.moves and found.verdict == paired.CONFIRMED


def test_few_points_and_one_seed():
  with pytest.raises(errors.InputError, match='log_every'):
    difference_curves.outcome(made([0.1, 0.2]), 'lower')
  one = difference_curves.Curve(np.asarray([1e6, 2e6, 3e6]), -np.ones((1, 3)), 3e6)
  assert difference_curves.outcome(one, 'lower').verdict == paired.UNDECIDED


def test_in_words():
  text = difference_curves.sentence(logarithmic(-0.1, -0.2), 'confirmed')
  assert text.startswith('confirmed at 30.0M tokens: -0.100 [-0.102, -0.098], slope -0.200')
  assert 'below zero after 21.2M tokens [21.0M, 22.0M]' in text
  assert 'no crossover: the mean is above zero throughout' in difference_curves.sentence(
    made([0.1, 0.2]), 'contradicted'
  )
  assert 'no crossover: the mean is at zero throughout' in difference_curves.sentence(
    made([0.0, 0.0], noise=0.0), paired.UNDECIDED
  )
  assert difference_curves.millions(307_200) == '0.307M'


def test_rates_are_the_same_if_every_step_has_the_same():
  first = tiny.make().optim
  assert difference_curves.same_rates(first, dataclasses.replace(first, weight_decay=0.5))
  for changed in (
    {'peak_lr': 2 * first.peak_lr},
    {'schedule': 'cosine'},
    {'warmup_steps': first.warmup_steps + 1},
    {'final_lr_fraction': 0.5},
    {'multi_step_factor': 0.9},
    {'multi_step_boundaries': (0.5,)},
    {'stages': ((1.0, 1.0, 'constant'),)},
  ):
    assert not difference_curves.same_rates(first, dataclasses.replace(first, **changed)), changed
