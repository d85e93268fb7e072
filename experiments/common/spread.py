"""Mean and standard deviation over seeds, as text."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float | None] | None, digits: int, scale: float = 1.0) -> str:
  """`mean ± sample standard deviation`; the mean alone for one value, - for none."""
  if not values or None in values:
    return '-'
  scaled = [scale * v for v in values]
  text = f'{statistics.mean(scaled):.{digits}f}'
  return f'{text} ± {statistics.stdev(scaled):.{digits}f}' if len(scaled) > 1 else text
