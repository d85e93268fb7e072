import pytest

from moe_jax.planning import matched_budgets


@pytest.mark.parametrize(
  'first, value, want',
  [
    (1000, 1000, 'equal'),
    (0, 0, 'equal'),
    (0.3, 0.1 + 0.2, 'equal'),
    (1000, 1234, '+234 (+23.4 %)'),
    (1000, 900, '-100 (-10.0 %)'),
    (16_375_728_128, 16_375_728_129, '+1 (+6e-09 %)'),
    (2.5, 2.0, '-0.5 (-20.0 %)'),
    (0, 512.5, '+512.5 (from 0)'),
    (512, 0, '-512 (-100.0 %)'),
  ],
)
def test_difference(first, value, want):
  assert matched_budgets.difference(first, value) == want


def test_lines_are_aligned_and_against_the_first():
  columns = [{'a': 1, 'long name': 2}, {'a': 1, 'long name': 3}, {'a': 2, 'long name': 2}]
  assert matched_budgets.lines('ABC', columns) == [
    'B  a          equal',
    'B  long name  +1 (+50.0 %)',
    'C  a          +1 (+100.0 %)',
    'C  long name  equal',
  ]
  assert matched_budgets.lines('A', columns[:1]) == []
