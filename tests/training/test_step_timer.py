import pytest

from moe_jax.training import step_timer


def test_step_timer():
  now = [0.0]
  timer = step_timer.StepTimer(flops_per_token=50.0, peak=10_000.0, clock=lambda: now[0])

  def spend(seconds):
    now[0] += seconds

  with timer.paused():
    spend(100)
  with timer.waiting():
    spend(1)
  timer.add_tokens(600)
  spend(4)
  timer.add_tokens(400)
  spend(5)
  # 1000 tokens in 10 s that count; 100 tokens/s * 50 FLOPs of 10000 FLOP/s.
  rates = {'tokens_per_second': 100.0, 'mfu': 0.5, 'data_wait_share': 0.1}
  assert timer.report() == {**rates, 'save_stall_share': 0.0}
  timer.add_tokens(30)
  with timer.saving():
    spend(2)
  spend(3)
  # 2 s of saving do not count as training; they are 2 of the 10 + 3 + 2 s so far.
  rates = {'tokens_per_second': 10.0, 'mfu': 0.05, 'data_wait_share': 0.0}
  assert timer.report() == {**rates, 'save_stall_share': pytest.approx(2 / 15)}
  assert timer.report()['tokens_per_second'] == 0.0


def test_all_time_belongs_to_a_phase():
  now = [0.0]
  timer = step_timer.StepTimer(1.0, 1.0, clock=lambda: now[0])

  def spend(seconds):
    now[0] += seconds

  spend(1)
  with timer.paused('compile'):
    spend(10)
    assert timer.phase == ('compile', 1.0)
    assert timer.seconds()['compile'] == 10  # also while it lasts
    assert timer.phase == ('compile', 1.0)  # looking is no progress
  with timer.waiting():
    spend(2)
  with timer.saving():
    spend(3)
  with timer.paused('evaluation'):
    spend(4)
  with timer.paused():
    spend(5)
  spend(6)
  timer.add_tokens(1)
  assert timer.phase == ('steps', 31.0)
  want = {'steps': 7, 'data': 2, 'compile': 10, 'saving': 3, 'evaluation': 4, 'other': 5}
  assert timer.seconds() == want and tuple(want) == step_timer.PHASES
