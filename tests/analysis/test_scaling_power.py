"""How many runs tell an exponent from 0: limits that are known, and a grid by hand."""

import numpy as np
import pytest

from moe_jax.analysis import scaling_laws, scaling_power

TRUTH = scaling_power.Truth(
  rate=-0.25, batch=0.3, curvature=np.diag([0.02, 0.01]), noise=0.005, grid=(5, 4)
)


def test_all_budgets_have_one_grid_that_reaches_beyond_both_optima():
  points = scaling_power._points(TRUTH, np.array([0.0, 8.0]), np.array([0.1, 0.2]))
  first, last = points[points[:, 0] == 0.0], points[points[:, 0] == 8.0]
  np.testing.assert_array_equal(first[:, 1:3], last[:, 1:3])
  # Optima at 0.1 and -1.9, 0.2 and 2.6: in powers of two 0 and -3, 0 and 4.
  rates, batches = (sorted(set(np.round(first[:, i] / np.log(2), 9))) for i in (1, 2))
  assert rates == list(range(-5, 3)) and batches == list(range(-1, 7))
  u, v = last[7, 1:3] - [-1.9, 2.6]
  assert last[7, 3] == pytest.approx(1 + 0.02 * u**2 + 0.01 * v**2)


def test_without_noise_the_exponent_is_found_and_with_much_it_is_not():
  quiet = scaling_power.power(TRUTH._replace(noise=1e-6), 'rate', 3.0, 1, studies=20)
  loud = scaling_power.power(TRUTH._replace(noise=0.1), 'rate', 3.0, 1, studies=20)
  assert quiet.power == 1.0 and loud.power <= 0.35
  assert quiet.budgets == 11 and quiet.runs % 11 == 0


def test_an_exponent_of_zero_is_seldom_told_from_zero():
  found = scaling_power.power(TRUTH._replace(rate=0.0), 'rate', 2.0, 4, studies=60)
  assert found.power <= 0.25  # its intervals hold 90 %


def test_more_seeds_and_more_decades_tell_more():
  few, many = (scaling_power.power(TRUTH, 'batch', 1.5, n).power for n in (1, 32))
  short, long = (scaling_power.power(TRUTH, 'batch', d, 2).power for d in (0.6, 3.0))
  assert few < many and short < long


def test_a_mean_of_four_seeds_scatters_half_as_much():
  loud = TRUTH._replace(noise=0.04)
  of_four = scaling_power.power(loud, 'rate', 1.0, 4)
  alone = scaling_power.power(loud._replace(noise=0.02), 'rate', 1.0, 1)
  assert of_four.power == alone.power and of_four.runs == 4 * alone.runs
  assert 0 < alone.power < 1 and of_four.power != scaling_power.power(loud, 'rate', 1.0, 1).power


def test_the_least_study_is_the_first_with_enough_power():
  found = scaling_power.least(TRUTH, 'rate', 2.0, band=0.01)
  assert found is not None and found.power >= scaling_power.POWER
  before = scaling_power.REPEATS[: scaling_power.REPEATS.index(found.repeats)]
  assert all(
    scaling_power.power(TRUTH, 'rate', 2.0, n, band=0.01).power < scaling_power.POWER
    for n in before
  )
  loud = TRUTH._replace(noise=0.2, rate=-0.01)
  assert scaling_power.least(loud, 'rate', 0.5, band=0.0025) is None


def test_curvature_is_that_of_the_surface_in_shares_of_its_lowest_loss():
  u, v = (a.ravel() for a in np.meshgrid(np.linspace(-2, 2, 5), np.linspace(-1, 3, 4)))
  losses = 2 * (1 + 0.03 * u**2 + 0.02 * u * (v - 1) + 0.05 * (v - 1) ** 2)
  surface = scaling_laws.fit_surface(np.exp(u), np.exp(v), losses)
  got = scaling_power.curvature([surface])
  np.testing.assert_allclose(got, [[0.03, 0.01], [0.01, 0.05]], atol=1e-9)
  saddle = scaling_laws.fit_surface(np.exp(u), np.exp(v), 2 + 0.03 * u**2 - 0.05 * v**2)
  np.testing.assert_allclose(scaling_power.curvature([saddle, surface]), got)
  with pytest.raises(ValueError, match='no surface has a minimum'):
    scaling_power.curvature([saddle])
