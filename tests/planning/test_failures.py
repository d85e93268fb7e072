import math

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.planning import failures


def test_intervals_worked_out_by_hand():
  # C = 2, M = 100: sqrt(2 x 2 x 100) = 20, and 20 (1 + 0.1 / 3 + 0.01 / 9) - 2.
  assert failures.young_interval(2, 100) == 20
  assert failures.daly_interval(2, 100) == pytest.approx(20 * (1 + 0.1 / 3 + 0.01 / 9) - 2)
  assert failures.daly_interval(200, 100) == 100  # longer than 2 M: save once per failure


def test_shares_worked_out_by_hand():
  # 3600 chips that fail every 100 hours: one failure in 100 s.
  stated = failures.Failures(mtbf_hours=100, checkpoint_seconds=2, restart_seconds=10)
  found = failures.goodput(stated, 3600)
  work = failures.daly_interval(2, 100)
  total = 100 * math.exp(0.1) * (math.exp((work + 2) / 100) - 1)
  assert (found.mtbf_seconds, found.young_seconds) == (100, 20)
  assert found.interval_seconds == pytest.approx(work)
  assert found.goodput == pytest.approx(work / total)
  assert found.checkpoints == pytest.approx(2 / total)
  assert found.goodput + found.checkpoints + found.failures == pytest.approx(1)


def test_no_other_interval_is_better():
  for checkpoint, mtbf in ((2, 100), (30, 18_000), (60, 600)):
    steps = np.linspace(1, 4 * failures.young_interval(checkpoint, mtbf), 4000)
    shares = [t / failures.mean_seconds(t, checkpoint, 0, mtbf) for t in steps]
    daly = failures.daly_interval(checkpoint, mtbf)
    assert daly / failures.mean_seconds(daly, checkpoint, 0, mtbf) > max(shares) - 1e-4


def simulated(stated: failures.Failures, num_chips: int, interval: float, pieces: int) -> float:
  """Share of the time that counts, of a run that is lived through failure by failure."""
  rng = np.random.default_rng(0)
  mtbf = stated.mtbf_hours * 3600 / num_chips
  clock = 0.0
  for _ in range(pieces):
    left = interval + stated.checkpoint_seconds
    while (failure := rng.exponential(mtbf)) < left:
      clock += failure
      while (again := rng.exponential(mtbf)) < stated.restart_seconds:
        clock += again
      clock += stated.restart_seconds
    clock += left
  return pieces * interval / clock


@pytest.mark.parametrize('num_chips', [512, 2048, 10_000])
def test_a_simulated_run_loses_as_much(num_chips):
  stated = failures.Failures(mtbf_hours=50_000, checkpoint_seconds=60, restart_seconds=600)
  found = failures.goodput(stated, num_chips)
  share = simulated(stated, num_chips, found.interval_seconds, 30_000)
  # 30,000 pieces see 2,000 to 10,000 failures: their number, so the loss, is known to 2 %.
  assert 1 - found.goodput == pytest.approx(1 - share, rel=0.05)
  for other in (found.interval_seconds / 2, found.interval_seconds * 2):
    assert simulated(stated, num_chips, other, 30_000) < share


@pytest.mark.parametrize(
  'values, words',
  [
    (dict(mtbf_hours=0), '--mtbf_hours=0 must be'),
    (dict(checkpoint_seconds=-1), '--checkpoint_seconds=-1 must be'),
    (dict(restart_seconds=math.inf), '--restart_seconds=inf must be'),
    (dict(mtbf_hours=0.01), 'would never end'),
  ],
)
def test_mistakes(values, words):
  right = dict(mtbf_hours=50_000, checkpoint_seconds=60, restart_seconds=600)
  with pytest.raises(errors.InputError, match=words):
    failures.goodput(failures.Failures(**(right | values)), 1000)
