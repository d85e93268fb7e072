import dataclasses
import math

import pytest

from moe_jax import errors
from moe_jax.planning import chips, run_cost
from tests.planning import plans

# 1e6 tokens per second at an MFU of 0.5.
PLAN = dataclasses.replace(plans.PLAN, mfu_bound=0.5, tokens_per_second_bound=1e6)
V5P, TPU7X = chips.parse('v5p:8x8x8'), chips.parse('tpu7x:8x8x8')


def test_hours_and_money_worked_out_by_hand():
  # 3.6e12 tokens at 1e6 per second: 1000 hours of 512 chips, 2 each.
  found = run_cost.run_cost(V5P, PLAN, tokens=3.6e12, chip_hour_price=2.0)
  assert (found.seconds, found.num_chips) == (3.6e6, 512)
  assert found.chip_hours == pytest.approx(512_000)
  assert found.chip_hours_per_trillion_tokens == pytest.approx(512_000 / 3.6)
  assert found.money == pytest.approx(1_024_000)
  assert found.money_per_trillion_tokens == pytest.approx(1_024_000 / 3.6)


def test_what_is_not_reached_or_lost_is_paid_for():
  whole = run_cost.run_cost(V5P, PLAN, tokens=1e12)
  found = run_cost.run_cost(V5P, PLAN, tokens=1e12, mfu=0.25, goodput=0.8)
  assert found.chip_hours == pytest.approx(whole.chip_hours * 2 / 0.8)
  assert found.money is None and found.money_per_trillion_tokens is None


def test_two_devices_are_one_chip_of_tpu7x():
  assert TPU7X.num_devices == 1024 and run_cost.num_chips(TPU7X) == 512
  assert run_cost.run_cost(TPU7X, PLAN, tokens=1e12).num_chips == 512


@pytest.mark.parametrize(
  'values, words',
  [
    (dict(tokens=0), '--tokens=0 must be a number above 0'),
    (dict(tokens=math.inf), '--tokens=inf must be a number above 0'),
    (dict(tokens=1, chip_hour_price=math.inf), '--chip_hour_price=inf must be'),
    (dict(tokens=1, chip_hour_price=-1), '--chip_hour_price=-1 must be'),
    (dict(tokens=1, mfu=0.6), r"at most the plan's bound, 0\.500"),
  ],
)
def test_mistakes(values, words):
  with pytest.raises(errors.InputError, match=words):
    run_cost.run_cost(V5P, PLAN, **values)
