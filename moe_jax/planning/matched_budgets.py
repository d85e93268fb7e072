"""Whether configs that are compared cost the same, and by how much they do not."""

import math
from collections.abc import Mapping, Sequence


def percent(first: float, value: float) -> str:
  """How much more than `first` (not 0) `value` is; small differences never read as none."""
  difference = 100 * (value / first - 1)
  return f'{difference:+,.1f} %' if abs(difference) >= 0.1 else f'{difference:+.1g} %'


def difference(first: float, value: float) -> str:
  """'equal', or the difference from `first`, absolute and in percent."""
  # Counts are equal to the last digit; of expectations, rounding may change the last ones.
  counts = isinstance(first, int) and isinstance(value, int)
  if first == value or not counts and math.isclose(first, value, rel_tol=1e-12):
    return 'equal'
  absolute = f'{value - first:+,.1f}'.removesuffix('.0')
  return f'{absolute} ({percent(first, value)})' if first else f'{absolute} (from 0)'


def lines(labels: Sequence[str], columns: Sequence[Mapping[str, float]]) -> list[str]:
  """One line per config after the first and quantity.

  Args:
    labels: short names of the configs.
    columns: {quantity: value} per config, all with the keys of the first.
  """
  width = max(map(len, columns[0]))
  return [
    f'{label}  {name.ljust(width)}  {difference(first, column[name])}'
    for label, column in zip(labels[1:], columns[1:])
    for name, first in columns[0].items()
  ]


def cache_lines(labels: Sequence[str], columns: Sequence[Mapping[int, int]]) -> list[str]:
  """One line per config and width of the numbers in its cache, against the first of all.

  Equal widths compare architectures; unequal ones, caches as they are deployed.

  Args:
    labels: short names of the configs.
    columns: {bits per number: bytes per token}, all with the keys of the first.
  """
  caches = [
    (label, bits, size) for label, sizes in zip(labels, columns) for bits, size in sizes.items()
  ]
  first, width = caches[0][2], max(len(f'{size:,}') for *_, size in caches)

  def against(size):
    return 'equal' if size == first else percent(first, size)

  return [
    f'{label}  {bits:2d} bits  {size:{width},d} bytes  {against(size)}'
    for label, bits, size in caches
  ]
