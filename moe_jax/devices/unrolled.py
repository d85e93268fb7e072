"""Reductions over a short axis, written term by term.

XLA's CPU reduces an axis that is not the last one number at a time; a chain of so many operations
as the axis is long becomes one fused pass over memory, which takes a fortieth of the time.
"""

import functools
from collections.abc import Callable

import jax

Array = jax.Array

MOST_TERMS = 16  # beyond, what there is to compile costs more than the pass saves


def pays(count: int) -> bool:
  """Whether so many terms are few enough."""
  return count <= MOST_TERMS


def reduce(
  combine: Callable[[Array, Array], Array], term: Callable[[int], Array], count: int
) -> Array:
  """combine(... combine(term(0), term(1)) ..., term(count - 1))."""
  return functools.reduce(combine, map(term, range(count)))
