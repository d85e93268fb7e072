"""Mean and standard deviation over seeds, as text."""

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float | None] | None, digits: int, scale: float = 1.0) -> str:
  """`mean ± sample standard deviation`; the mean alone for one value, - for none.

  In words where a value is infinite or NaN, as that of a run that diverged is.
  """
  if not values or None in values:
    return '-'
  if not all(map(math.isfinite, values)):
    return 'not finite'
  scaled = [scale * v for v in values]
  text = f'{statistics.mean(scaled):.{digits}f}'
  return f'{text} ± {statistics.stdev(scaled):.{digits}f}' if len(scaled) > 1 else text
