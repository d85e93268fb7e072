"""Chip-hours and money of a whole run, from the speed of one step.

An estimate, and optimistic where the speed is a roofline's bound: no step reaches it. For scale,
DeepSeek's own runs in H800-hours per trillion tokens: 300.6K for 67B and 172.8K for V2 (arXiv
2405.04434, section 3.2.3), 180K for V3, which trains in FP8 (arXiv 2412.19437, section 1).
"""

import dataclasses
import math

from moe_jax import errors
from moe_jax.planning import chips, planner

TRILLION = 1e12
_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class RunCost:
  """What a number of tokens costs."""

  tokens: float
  mfu: float  # while steps run
  goodput: float  # share of the time in which steps run that count
  num_chips: int  # as makers and clouds count: two devices of JAX on v4 and tpu7x
  seconds: float
  chip_hours: float
  chip_hours_per_trillion_tokens: float
  money: float | None  # in the unit of the price
  money_per_trillion_tokens: float | None


def num_chips(topology: chips.Topology) -> int:
  """How many chips a topology has, as they are paid for and as they fail."""
  return topology.num_devices // topology.chip.per_chip


def run_cost(
  topology: chips.Topology,
  plan: planner.Plan,
  *,
  tokens: float,
  chip_hour_price: float | None = None,
  mfu: float | None = None,
  goodput: float = 1.0,
) -> RunCost:
  """Chip-hours and money for a number of tokens.

  Args:
    topology: the devices of the plan.
    plan: says what an MFU is in tokens per second.
    tokens: of the run.
    chip_hour_price: of one chip for an hour; None: no money is counted.
    mfu: what steps reach; None: the plan's bound.
    goodput: see `failures.Goodput`.

  Raises:
    errors.InputError: tokens or price are not positive, or no step can reach the MFU.
  """
  errors.require(
    0 < tokens < math.inf, f'--tokens={tokens:g} must be a number above 0; 1e12 is a trillion'
  )
  errors.require(
    chip_hour_price is None or 0 < chip_hour_price < math.inf,
    f'--chip_hour_price={chip_hour_price} must be a number above 0; leave it out to count no money',
  )
  errors.require(
    mfu is None or 0 < mfu <= plan.mfu_bound,
    f"--mfu={mfu} must be above 0 and at most the plan's bound, {plan.mfu_bound:.3f}; leave it out "
    'for the bound itself',
  )
  reached = plan.mfu_bound if mfu is None else mfu
  speed = plan.tokens_per_second_bound * reached / plan.mfu_bound
  seconds = tokens / speed / goodput
  count = num_chips(topology)
  hours = count * seconds / _HOUR
  per_trillion = hours * TRILLION / tokens
  return RunCost(
    tokens=tokens,
    mfu=reached,
    goodput=goodput,
    num_chips=count,
    seconds=seconds,
    chip_hours=hours,
    chip_hours_per_trillion_tokens=per_trillion,
    money=None if chip_hour_price is None else hours * chip_hour_price,
    money_per_trillion_tokens=None if chip_hour_price is None else per_trillion * chip_hour_price,
  )
