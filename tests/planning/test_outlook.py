import dataclasses

import pytest

from moe_jax import errors
from moe_jax.planning import failures, outlook, planner
from tests.planning import plans, requests

PLAN = dataclasses.replace(plans.PLAN, step_seconds_bound=10.0, mfu_bound=0.5)
STATED = failures.Failures(mtbf_hours=1000, checkpoint_seconds=60, restart_seconds=600)


def test_without_questions_only_the_cost_is_told():
  found = outlook.outlook(requests.request(), PLAN, outlook.Questions())
  assert found.cost.tokens == 1e12 and found.cost.goodput == 1 and found.cost.money is None
  assert found.goodput is None and found.steps_between_checkpoints is None
  assert found.pipelines == ()


def test_failures_are_paid_for_and_counted_in_steps_at_the_speed_that_is_reached():
  asked = outlook.Questions(mfu=0.25, failures=STATED)
  found = outlook.outlook(requests.request(), PLAN, asked)
  lost = failures.goodput(STATED, 8)
  assert found.goodput == lost and found.cost.goodput == lost.goodput
  assert found.steps_between_checkpoints == round(lost.interval_seconds / 20)  # half the speed


def test_pipelines_are_compared_with_the_plan():
  request = requests.request(train__batch_size=16)
  plan = planner.plan(request)
  found = outlook.outlook(request, plan, outlook.Questions(stages=2))
  assert [one.stages for one in found.pipelines] == [2] * 5
  assert found.step_seconds_one_by_one == sum(plan.seconds.values())


def test_decoding_has_neither():
  request = dataclasses.replace(requests.request(), decode=True)
  for asked in (outlook.Questions(stages=2), outlook.Questions(failures=STATED)):
    with pytest.raises(errors.InputError, match='are about training'):
      outlook.outlook(request, PLAN, asked)
