"""What the tests of planning share."""

import functools

from moe_jax.planning import (
  chips,
  planner,
)
from tests import tiny

MESH = dict(mesh__data=2, mesh__fsdp=2, mesh__expert=2)


@functools.cache
def request(topology: str = 'h100:8', **overrides) -> planner.Request:
  return planner.Request(tiny.make(**(MESH | overrides)), chips.parse(topology))
