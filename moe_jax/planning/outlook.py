"""What follows from a plan: cost of the run, time lost to failures, and what a pipeline gives."""

import dataclasses
from typing import Any

from moe_jax import errors
from moe_jax.planning import failures as failures_lib
from moe_jax.planning import pipeline, planner, run_cost


@dataclasses.dataclass(frozen=True)
class Questions:
  """What is asked of a plan."""

  tokens: float = run_cost.TRILLION
  chip_hour_price: float | None = None
  mfu: float | None = None
  failures: failures_lib.Failures | None = None
  stages: int = 0  # of a pipeline to compare with; 0 = none


@dataclasses.dataclass(frozen=True)
class Outlook:
  """The answers; all of them are estimates."""

  cost: run_cost.RunCost
  goodput: failures_lib.Goodput | None
  steps_between_checkpoints: int | None  # at the MFU of the cost
  pipelines: tuple[pipeline.Pipelined, ...]
  step_seconds_bound: float  # of the plan, to compare the pipelines with
  step_seconds_one_by_one: float

  def to_json(self) -> dict[str, Any]:
    """As `plan --json` shows it."""
    return dataclasses.asdict(self)


def outlook(request: planner.Request, plan: planner.Plan, asked: Questions) -> Outlook:
  """Answers what is asked of a plan.

  Raises:
    errors.InputError: a stated value is out of range, or training is asked of a plan of decoding.
  """
  errors.require(
    not request.decode or (asked.failures is None and not asked.stages),
    '--mtbf_hours and --pipeline are about training; leave them or --decode out',
  )
  goodput = None
  if asked.failures is not None:
    goodput = failures_lib.goodput(asked.failures, run_cost.num_chips(request.topology))
  cost = run_cost.run_cost(
    request.topology,
    plan,
    tokens=asked.tokens,
    chip_hour_price=asked.chip_hour_price,
    mfu=asked.mfu,
    goodput=goodput.goodput if goodput else 1.0,
  )
  steps = None
  if goodput:
    seconds = plan.step_seconds_bound * plan.mfu_bound / cost.mfu
    steps = max(1, round(goodput.interval_seconds / seconds))
  found = pipeline.best(request, asked.stages) if asked.stages else []
  return Outlook(
    cost=cost,
    goodput=goodput,
    steps_between_checkpoints=steps,
    pipelines=tuple(found),
    step_seconds_bound=plan.step_seconds_bound,
    step_seconds_one_by_one=sum(plan.seconds.values()),
  )
