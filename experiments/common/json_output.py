"""What commands print with --json: RFC 8259, which has no number for NaN and infinities."""

import json
import math
from typing import Any


def show(value: Any, **options: Any):
  """Prints a value as JSON; numbers that are not finite become null.

  Args:
    value: what `json.dumps` takes.
    **options: of `json.dumps`.
  """
  print(json.dumps(_finite(value), allow_nan=False, **options))


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(one) for key, one in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
