"""How the scatter between seeds goes with what a repetition saves."""

import pathlib

import numpy as np
import pytest
from scipy import stats

from experiments.common import html_report
from experiments.routing_ablation import arms, earlier, measure, repetition

MAIN = next(c for c in arms.CLAIMS if (c.arm, c.baseline) == ('deepseekmoe', 'gshard'))


TOP = pathlib.Path(repetition.__file__).parent


def runs(*pairs):
  return {seed: {measure.SAVED: saved, arms.BITS: bits} for seed, (saved, bits) in enumerate(pairs)}


RESULTS = {
  'gshard': runs((0.1, 1.4), (0.6, 1.3), (0.2, 1.39), (0.5, 1.31)),
  'deepseekmoe': runs((0.3, 1.33), (0.5, 1.31), (0.4, 1.3)),
  # Too few seeds, or not known, as in earlier reports.
  'm4': runs((0.0, 9.0), (1.0, 0.0)),
  'dense': runs((None, 2.0), (None, 2.1), (0.3, 2.2)),
}


def test_against_a_regression_with_a_constant_for_each_arm():
  found = repetition.together(repetition.figures(RESULTS))
  x = np.array([0.1, 0.6, 0.2, 0.5, 0.3, 0.5, 0.4])
  y = np.array([1.4, 1.3, 1.39, 1.31, 1.33, 1.31, 1.3])
  arm = np.array([0, 0, 0, 0, 1, 1, 1])
  design = np.stack([x, arm == 0, arm == 1], axis=1).astype(float)
  assert found.slope == pytest.approx(np.linalg.lstsq(design, y, rcond=None)[0][0])
  rest = [v - design[:, 1:] @ np.linalg.lstsq(design[:, 1:], v, rcond=None)[0] for v in (x, y)]
  assert found.correlation == pytest.approx(stats.pearsonr(*rest).statistic)
  assert found.low < found.correlation < found.high <= 0 and found.share > 0.8
  assert (found.num_runs, found.num_arms) == (7, 2)


def test_the_interval_of_one_arm_is_the_usual_one():
  saved, bits = np.random.default_rng(0).normal(size=(2, 12))
  found = repetition.together({'gshard': (saved, bits)})
  interval = stats.pearsonr(saved, bits).confidence_interval(0.95)
  assert (found.low, found.high) == pytest.approx(tuple(interval))


def test_too_few_runs_or_none_that_differ_say_nothing(tmp_path):
  few = {'gshard': RESULTS['gshard']}
  assert repetition.together(repetition.figures(few)) is None
  assert repetition.blocks(tmp_path / 'a.png', few, []) == []
  assert repetition.together({'gshard': ([0.1] * 9, list(range(9)))}) is None


def test_the_report_has_a_picture_and_a_sentence(tmp_path):
  heading, picture, text, bullets = repetition.blocks(tmp_path / 'a.png', RESULTS, [MAIN])
  assert isinstance(heading, html_report.Heading) and picture.path.stat().st_size > 5000
  assert 'over 7 runs of 2: a nat' in text.text and 'correlation -0.9' in text.text
  assert bullets.items == ['No claim has pairs enough.']


def test_the_difference_between_runs_that_copy_as_well():
  """Seeds that save more by 0.1 are better by 0.03, and the arm is better by 0.02 beside that."""
  base = [(0.5, 1.3), (0.1, 1.45), (0.6, 1.28), (0.4, 1.33), (0.3, 1.36)]
  more = np.array([0.1, 0.3, -0.1, 0.0, 0.2])
  noise = np.array([1.0, -2.0, 1.0, 1.0, -1.0]) * 1e-3
  arm = [(s + m, b - 0.02 - 0.3 * m + e) for (s, b), m, e in zip(base, more, noise)]
  results = {'gshard': runs(*base), 'deepseekmoe': runs(*arm)}
  found = repetition.at_equal_copying(results, MAIN)
  # Its constant by the normal equations, and the spread of that.
  design = np.stack([np.ones(5), more], axis=1)
  y = -0.02 - 0.3 * more + noise
  beta, rest = np.linalg.lstsq(design, y, rcond=None)[:2]
  error = np.sqrt(rest[0] / 3 * np.linalg.inv(design.T @ design)[0, 0])
  assert found.mean == pytest.approx(beta[0]) and found.mean == pytest.approx(-0.02, abs=2e-3)
  assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 3) * error)
  assert found.num_seeds == 5
  few = {name: {s: one for s, one in by_seed.items() if s} for name, by_seed in results.items()}
  assert repetition.at_equal_copying(few, MAIN) is None
  alike = {name: {s: r | {measure.SAVED: 0.1} for s, r in o.items()} for name, o in results.items()}
  assert repetition.at_equal_copying(alike, MAIN) is None
  other = next(claim for claim in arms.CLAIMS if claim.figure != arms.BITS)
  assert repetition.at_equal_copying(results, other) is None


def test_what_is_published_follows_from_the_published_runs(tmp_path):
  pages = {arm.name: arms.resolve(arm, 'tiny') for arm in arms.of_scale('tiny')}
  results = earlier.read(TOP / 'tiny_10000', pages, 'tiny')
  *_, text, bullets = repetition.blocks(tmp_path / 'a.png', results, [MAIN])
  published = (TOP / 'tiny_10000' / 'report.md').read_text()
  assert text.text in published and f'- {bullets.items[0]}' in published
  both, equal = repetition.together(repetition.figures(results)), repetition.at_equal_copying
  page = (TOP / 'README.md').read_text()
  assert f'{both.share:.0%} of the scatter'.replace('%', ' %') in page
  m4 = next(c for c in arms.CLAIMS if (c.arm, c.baseline) == ('m4', 'gshard'))
  assert all(equal(results, claim).text(3) in page for claim in (MAIN, m4))
