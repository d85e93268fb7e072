"""Whole runs of several lengths, and any two arms against each other."""

import pathlib

import pytest

from experiments.routing_ablation import all_pairs, arms, length_pictures, lengths, report
from moe_jax.analysis import paired
from tests import in_process
from tests.experiments import test_routing_ablation as ablation

ROOT = pathlib.Path(__file__).parents[2]


def test_an_upcycled_arm_against_a_run_as_long_as_its_own_and_its_start():
  def runs(steps, **bits):
    made = {
      name: {seed: ablation.run_of(bits[name] + 0.1 * seed) | {'step': steps} for seed in (0, 1, 2)}
      for name in bits
    }
    return made

  by_steps = {
    100: runs(100, gshard=2.5, upcycled=2.1, dense=2.6),
    200: runs(200, gshard=2.2, dense=2.4),
    300: runs(300, gshard=2.0, upcycled=1.9),
  }
  by_steps[200]['gshard'][1]['bits_per_byte'] += 0.03
  ((claim, (point,)),) = lengths.with_their_start(by_steps, 'tiny').items()
  assert (claim.arm, claim.baseline, claim.direction) == ('upcycled', 'gshard', 'equal')
  assert '`dense` counted in full' in claim.paper
  assert point.tokens == 102_400  # its own
  assert point.graded.difference.mean == pytest.approx(2.1 - 2.2 - 0.03 / 3)
  assert point.graded.plain == 'contradicted'  # clearly below: no equality


def test_where_whole_runs_cross_zero():
  claim = next(c for c in arms.CLAIMS if (c.arm, c.baseline) == ('deepseekmoe', 'gshard'))

  def point(tokens, *differences):
    found = paired.interval(differences)
    return lengths.Point(tokens, report.Graded(claim, found, 'p', 2.0, 1.0, holm='h'), (0.1, 0.2))

  some = [point(1_000_000, 0.19, 0.21), point(4_000_000, 0.1, -0.5), point(16_000_000, -0.3, -0.31)]
  crossing = length_pictures.crossing_of(some)  # half-way of the logarithm
  assert crossing.tokens == pytest.approx(2_000_000) and crossing.lower_after
  assert (crossing.low, crossing.high) == (1_000_000, 16_000_000)
  text = length_pictures.over_lengths(some)
  assert text == 'Over whole runs: below zero after 2.00M tokens [1.00M, 16.0M]'
  assert 'the mean is above zero at every length' in length_pictures.over_lengths(some[:1])
  assert 'the mean is below zero at every length' in length_pictures.over_lengths(some[1:])
  table = lengths.blocks({claim: some}, [])[-1]
  assert table.rows[2][-2:] == ['p', 'h']


def test_any_two_arms_against_each_other(tmp_path):
  results = {
    'gshard': {seed: ablation.run_of(2.0 + 0.1 * seed) for seed in (0, 1, 2)},
    'hash': {seed: ablation.run_of(1.9 + 0.1 * seed + 0.01 * (seed == 1)) for seed in (0, 1, 2, 3)},
    'm4': {seed: ablation.run_of(1.0) for seed in (0, 7)},
    'dense': {9: ablation.run_of(3.0)},
  }
  found = all_pairs.pairs(results)
  # Two common seeds at least; the arm of the lower mean first.
  assert [(pair.arm, pair.baseline) for pair in found] == [('hash', 'gshard')]
  assert found[0].difference.num_seeds == 3
  assert found[0].difference.mean == pytest.approx(-0.1 + 0.01 / 3)
  results['m4'][1] = ablation.run_of(1.3)
  found = all_pairs.pairs(results)
  assert [(pair.arm, pair.baseline) for pair in found] == [
    ('m4', 'hash'),
    ('m4', 'gshard'),
    ('hash', 'gshard'),
  ]
  single = paired.p_value([-0.1, -0.09, -0.1], 'lower')
  assert found[2].holm == pytest.approx(3 * single)  # the smallest of three
  rows = all_pairs.csv_text(found).splitlines()
  assert rows[0] == 'arm,baseline,seeds,mean,low,high,p by Holm'
  assert rows[3].startswith('hash,gshard,3,-0.09667,-0.11101,-0.08232,')
  picture = all_pairs.draw(tmp_path / 'pairs.png', found)
  assert picture.path.stat().st_size > 1000


def test_an_arm_that_is_behind_over_the_common_seeds_is_drawn(tmp_path):
  results = {
    'gshard': {seed: ablation.run_of(2.0) for seed in (0, 1)},
    'hash': {seed: ablation.run_of(2.1 if seed < 2 else 1.5) for seed in (0, 1, 2)},
  }
  (pair,) = found = all_pairs.pairs(results)
  assert pair.arm == 'hash' and pair.difference.mean == pytest.approx(0.1)
  assert all_pairs.draw(tmp_path / 'pairs.png', found).path.stat().st_size > 1000


def test_the_published_lengths_are_those_of_the_published_reports(tmp_path):
  top = ROOT / 'experiments/routing_ablation'
  names = ('tiny', 'tiny_1000', 'tiny_3000', 'tiny_6000', 'tiny_10000')
  given = ','.join(str(top / name) for name in names)
  in_process.run(lengths, f'--reports={given}', f'--out={tmp_path}')
  published = (top / 'lengths' / 'lengths.md').read_text()
  assert (tmp_path / 'lengths.md').read_text() == published
  assert sorted(path.name for path in tmp_path.glob('*.png')) == ['claims.png', 'lengths.png']
  assert 'routing_ablation/lengths/lengths.png' in (ROOT / 'README.md').read_text()
