"""Fits of scaling laws on data whose law is known, the paper's own points among them."""

import numpy as np
import pytest

from moe_jax.analysis import scaling_laws

# DeepSeek LLM, from its formulas: C, eta_opt, B_opt in tokens, M_opt, D_opt.
PAPER = np.array(
  [
    (1e17, 2.338e-3, 0.106e6, 1.404e8, 7.123e8),
    (1e18, 1.753e-3, 0.226e6, 4.695e8, 2.130e9),
    (1e19, 1.315e-3, 0.479e6, 1.570e9, 6.369e9),
    (1e20, 9.860e-4, 1.017e6, 5.251e9, 1.904e10),
    (3e20, 8.595e-4, 1.457e6, 9.342e9, 3.212e10),
  ]
)
BUDGETS = np.array([1e17, 3e17, 1e18, 3e18, 1e19])


@pytest.mark.parametrize(
  'column, coefficient, exponent',
  [(1, 0.3118, -0.1250), (2, 0.2920, 0.3271), (3, 0.1715, 0.5243), (4, 5.8316, 0.4757)],
)
def test_the_papers_constants_come_back_from_its_points(column, coefficient, exponent):
  law = scaling_laws.fit_power_law(PAPER[:, 0], PAPER[:, column])
  assert law.exponent == pytest.approx(exponent, abs=5e-4)
  assert law.coefficient == pytest.approx(coefficient, rel=0.02)


def profile(budget, noise=0.0, seed=0, reach=(0.2, 5.0)):
  """Losses that are lowest at the paper's M_opt, by a parabola in ln M."""
  best = 0.1715 * budget**0.5243
  sizes = best * np.geomspace(*reach, 8)
  losses = 2 + 40 * budget**-0.1 + 0.05 * np.log(sizes / best) ** 2
  rng = np.random.default_rng((seed, int(np.log10(budget) * 10)))
  return scaling_laws.Profile(budget, sizes, losses + noise * rng.standard_normal(len(sizes)))


def test_allocation_of_exact_profiles_is_the_papers():
  found = scaling_laws.fit_allocation([profile(b) for b in BUDGETS], samples=20)
  assert found.optimum.exponent == pytest.approx(0.5243, abs=1e-6)
  assert found.optimum.coefficient == pytest.approx(0.1715, rel=1e-4)
  assert found.tokens.exponent == pytest.approx(0.4757, abs=1e-6)
  assert found.optimum(1e18) * found.tokens(1e18) == pytest.approx(1e18)
  assert found.rejected == 0


def test_intervals_hold_the_true_exponent_about_as_often_as_they_say():
  held = 0
  for seed in range(40):
    found = scaling_laws.fit_allocation(
      [profile(b, 0.01, seed) for b in BUDGETS], samples=200, seed=seed
    )
    low, high = found.exponent_interval
    held += low <= 0.5243 <= high
  assert 30 <= held <= 40  # 90 % of 40 are 36


def test_a_minimum_outside_of_the_sizes_is_named_and_left_out():
  below, above = profile(1e18, reach=(1.5, 8)), profile(1e18, reach=(0.05, 0.7))
  assert 'below' in scaling_laws.fit_parabola(below.sizes, below.losses).problem
  assert 'above' in scaling_laws.fit_parabola(above.sizes, above.losses).problem
  upside_down = scaling_laws.fit_parabola(below.sizes, -profile(1e18).losses)
  assert 'opens downwards' in upside_down.problem
  diverged = [np.nan, *profile(1e18).losses[1:]]
  assert scaling_laws.fit_parabola(below.sizes, diverged).problem == 'a loss is not finite'
  good = [profile(b) for b in BUDGETS[:2]]
  found = scaling_laws.fit_allocation(
    [*good, scaling_laws.Profile(1e19, below.sizes, below.losses)], samples=5
  )
  assert found.parabolas[1e19].problem
  assert found.optimum.exponent == pytest.approx(0.5243, abs=1e-6)
  with pytest.raises(ValueError, match='two budgets'):
    scaling_laws.fit_allocation([good[0], scaling_laws.Profile(1e19, below.sizes, below.losses)])


def test_every_redrawn_allocation_is_the_fit_of_its_redrawn_profiles():
  """All samples at once, beside one after the other; some profiles lose their minimum."""
  profiles = [profile(b, 0.03, 3, reach=(0.2, 1.5)) for b in BUDGETS[:2]]
  profiles.append(profile(BUDGETS[2], 0.03, 3))
  found = scaling_laws.fit_allocation(profiles, samples=60, seed=2)
  parabolas = [found.parabolas[p.budget] for p in profiles]
  pool = np.concatenate([p.residuals * np.sqrt(8 / 5) for p in parabolas])  # 3 of 8 are fitted
  rng, laws, rejected = np.random.default_rng(2), [], 0
  for _ in range(60):
    points = []
    for one, parabola in zip(profiles, parabolas):
      redrawn = scaling_laws.fit_parabola(one.sizes, parabola(one.sizes) + rng.choice(pool, 8))
      rejected += bool(redrawn.problem)
      points += [] if redrawn.problem else [(one.budget, redrawn.minimum)]
    if len(points) >= 2:
      law = scaling_laws.fit_power_law(*zip(*points))
      laws.append((np.log(law.coefficient), law.exponent))
  assert rejected > 0 and 0 < len(laws) < 60
  np.testing.assert_allclose(found.samples, laws, rtol=1e-7)
  assert found.rejected == pytest.approx(rejected / 180)


def test_near_optimal_is_a_quarter_of_a_per_cent():
  losses = [2.0, 2.0049, 2.0051, np.nan]
  assert scaling_laws.near_optimal(losses).tolist() == [True, True, False, False]


def test_surface_finds_its_minimum_or_says_why_not():
  rate, batch = (a.ravel() for a in np.meshgrid(np.geomspace(1e-3, 1e-1, 5), [16, 32, 64, 128]))
  bowl = 2 + 0.1 * np.log(rate / 1e-2) ** 2 + 0.05 * np.log(batch / 50) ** 2
  found = scaling_laws.fit_surface(rate, batch, bowl)
  assert (found.a, found.b) == pytest.approx((1e-2, 50), rel=1e-6) and not found.problem
  assert found.lowest == pytest.approx(2.0)
  edge = scaling_laws.fit_surface(
    rate, batch, 2 + 0.1 * np.log(rate) ** 2 + 0.05 * np.log(batch) ** 2
  )
  assert 'outside' in edge.problem
  saddle = scaling_laws.fit_surface(rate, batch, np.log(rate) ** 2 - np.log(batch) ** 2)
  assert 'saddle' in saddle.problem
  with pytest.raises(ValueError, match='more than 6'):
    scaling_laws.fit_surface(rate[:6], batch[:6], bowl[:6])


def test_loss_curve_has_its_floor_and_decay():
  curve = scaling_laws.fit_loss_curve(BUDGETS, 1.5 + 30 * BUDGETS**-0.08)
  assert curve.floor == pytest.approx(1.5, abs=0.01)
  assert curve.decay == pytest.approx(0.08, abs=0.002)
  assert curve(1e20) == pytest.approx(1.5 + 30 * 1e20**-0.08, rel=1e-3)


def test_another_measure_interpolates_between_runs_and_never_beyond():
  tokens = {name: np.array([1e8, 1e10, 1e11]) for name in 'abcde'}
  losses = {name: 3 * t**-0.05 for name, t in tokens.items()}
  measure = {name: 1e8 * 2**i for i, name in enumerate('abcde')}
  (found,) = scaling_laws.resize_profiles(tokens, losses, measure, [1e18])
  assert found.sizes.tolist() == sorted(measure.values())
  np.testing.assert_allclose(found.losses, 3 * (1e18 / found.sizes) ** -0.05)
  assert (
    scaling_laws.resize_profiles(tokens, losses, measure, [1e21]) == []
  )  # all beyond their runs


def test_noise_wider_than_the_band_widens_the_interval():
  budgets = np.repeat(BUDGETS, 5)
  rates = np.tile(np.geomspace(1e-3, 1e-2, 5), len(BUDGETS))
  best = 3e-3 * (budgets / 1e18) ** -0.1
  losses = 2 + 0.05 * np.log(rates / best) ** 2
  spread = []
  for noise in (1e-5, 2e-2):
    samples = scaling_laws.bootstrap_near_optimal(budgets, rates, losses, noise, samples=100)
    low, high = scaling_laws.interval(samples[:, 1])
    spread.append(high - low)
  assert spread[0] < 0.2 * spread[1]


def test_every_redrawn_law_is_the_fit_of_its_near_optimal_points():
  """All samples at once, beside one after the other."""
  rng = np.random.default_rng(1)
  budgets = np.repeat([1e10, 3e10, 2e11], [6, 4, 7])
  values, losses = rng.uniform(0.01, 0.1, 17), 2 + 0.02 * rng.standard_normal(17)
  losses[3] = np.nan  # a run that diverged
  found = scaling_laws.bootstrap_near_optimal(budgets, values, losses, 0.004, samples=30, seed=5)
  draws = np.random.default_rng(5)
  for got in found:
    redrawn = losses * (1 + 0.004 * draws.standard_normal(17))
    chosen = np.concatenate(
      [scaling_laws.near_optimal(redrawn[budgets == budget]) for budget in (1e10, 3e10, 2e11)]
    )
    law = scaling_laws.fit_power_law(budgets[chosen], values[chosen])
    np.testing.assert_allclose(got, [np.log(law.coefficient), law.exponent], rtol=1e-8)


def drifting_bowls():
  """(budgets, rates, batches, losses) of optima C^-0.2 and C^0.4, the first one off the grid."""
  budgets = np.geomspace(1e10, 1e12, 5)
  rates, batches = np.geomspace(1e-3, 6.4e-2, 7), 128 * 2.0 ** np.arange(4)
  c, rate, batch = (x.ravel() for x in np.meshgrid(budgets, rates, batches, indexing='ij'))
  best_rate, best_batch = 1e-2 * (c / 1e11) ** -0.2, 250 * (c / 1e11) ** 0.4
  bowl = 0.01 * np.log(rate / best_rate) ** 2 + 0.01 * np.log(batch / best_batch) ** 2
  return c, rate, batch, 2 + bowl


def test_minima_of_surfaces_follow_an_optimum_that_leaves_the_grid():
  c, rate, batch, losses = drifting_bowls()
  minima = scaling_laws.surface_minima(c, rate, batch, losses)
  assert len(minima) == 5 and 'outside' in minima[1e10].problem
  assert minima[1e12].b == pytest.approx(250 * 10**0.4)
  of_rate, of_batch = scaling_laws.fit_surface_laws(c, rate, batch, losses)
  assert of_rate.exponent == pytest.approx(-0.2) and of_batch.exponent == pytest.approx(0.4)
  # Near-optimal points end where the grid does, and their exponent is drawn towards 0.
  near = np.concatenate([scaling_laws.near_optimal(losses[c == b], 0.01) for b in np.unique(c)])
  assert scaling_laws.fit_power_law(c[near], batch[near]).exponent < 0.35
  # One step further beyond is no observation.
  far = batch > 200
  c, rate, batch, losses = (x[far] for x in (c, rate, batch, losses))
  assert 1e10 not in scaling_laws.surface_minima(c, rate, batch, losses)
  one = c == 1e12
  with pytest.raises(ValueError, match='three budgets with a minimum, not 1'):
    scaling_laws.fit_surface_laws(c[one], rate[one], batch[one], losses[one])


def test_redrawn_surface_laws_scatter_around_the_truth():
  of_rate, of_batch = scaling_laws.bootstrap_surface_laws(*drifting_bowls(), 0.002, samples=60)
  for samples, truth in ((of_rate, -0.2), (of_batch, 0.4)):
    low, high = scaling_laws.interval(samples[:, 1])
    assert samples.shape[1] == 2 and low < truth < high and high - low < 0.3
  still, _ = scaling_laws.bootstrap_surface_laws(*drifting_bowls(), 0.0, samples=2)
  np.testing.assert_allclose(still[:, 1], -0.2, rtol=1e-6)


def test_equal_values_have_an_exponent_of_zero():
  """Not of 1e-16 either way, which an interval would tell from 0 or not by chance."""
  budgets, values = np.repeat([2e10, 4e10, 8e10], 4), np.tile([0.005, 0.01, 0.02, 0.04], 3)
  losses = 2.0 + (values != 0.02)  # the third is best at every budget, whatever the noise
  found = scaling_laws.bootstrap_near_optimal(budgets, values, losses, 0.001, samples=50)
  assert (found[:, 1] == 0.0).all() and scaling_laws.interval(found[:, 1]) == (0.0, 0.0)
  np.testing.assert_allclose(found[:, 0], np.log(0.02))
  law = scaling_laws.fit_power_law([2e10, 4e10, 8e10], [0.02] * 3)
  assert law.exponent == 0.0 and law.coefficient == pytest.approx(0.02)


def test_an_exponent_needs_two_budgets():
  with pytest.raises(ValueError, match='two different budgets'):
    scaling_laws.bootstrap_near_optimal([1e17, 1e17], [1.0, 2.0], [3.0, 3.0], 0.01)
  with pytest.raises(ValueError, match='two different x'):
    scaling_laws.fit_power_law([1e17, 1e17], [1.0, 2.0])


def test_intervals_are_the_middle_nine_tenths():
  assert scaling_laws.interval(np.arange(101.0)) == (5.0, 95.0)
  exponents = np.linspace(0, 1, 101)
  samples = np.stack([np.full(101, np.log(2.0)), exponents], axis=1)
  low, high = scaling_laws.law_band(samples, [1.0, np.e])
  np.testing.assert_allclose([low, high], [[2, 2 * np.exp(0.05)], [2, 2 * np.exp(0.95)]])


def test_residuals_of_a_fit_are_widened_by_what_it_took_up(monkeypatch):
  np.testing.assert_allclose(scaling_laws._widened(np.ones(4), 3), 2.0)  # sqrt(4 / 1)
  np.testing.assert_allclose(scaling_laws._widened(np.ones(8), 3), np.sqrt(8 / 5))
  profiles, pools = [profile(b, 0.01) for b in BUDGETS], []

  class Draws:
    def choice(self, pool, size):
      pools.append(pool)
      return np.zeros(size)

  monkeypatch.setattr(np.random, 'default_rng', lambda seed: Draws())
  found = scaling_laws.fit_allocation(profiles, samples=1)
  residuals = [found.parabolas[p.budget].residuals for p in profiles]
  np.testing.assert_allclose(pools[0], np.concatenate(residuals) * np.sqrt(8 / 5))
