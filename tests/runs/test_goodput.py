"""Where the time of a run went, over its starts: what is lost counts as restart, sums are kept."""

import json

import pytest

from moe_jax.runs import goodput
from moe_jax.training import loop, step_timer


def start(workdir, spend, kill_after=None):
  """A start of ten steps of 4 s, with 1 s of data each, saved after steps 4 and 8; its seconds."""
  now = [0.0]
  timer = step_timer.StepTimer(1.0, 1.0, clock=lambda: now[0])
  spent = goodput.begin(workdir, spend)
  times = goodput.Goodput([workdir], timer, spent, lambda step: True, lambda step: step % 4 == 0)
  for step in range(1, (kill_after or 10) + 1):
    with timer.waiting():
      now[0] += 1
    now[0] += 4
    timer.add_tokens(1)
    if step % 4 == 0:
      with timer.saving():
        now[0] += 2
    times.after_step(loop.StepReport(step, None, None, complete=step == 10))
  return times.seconds()


def test_a_run_in_one_go(tmp_path):
  seconds = start(tmp_path, 5)
  want = {'steps': 40, 'data': 10, 'compile': 0, 'saving': 4, 'evaluation': 0, 'other': 0}
  assert seconds == want | {'start-up': 5, 'restart': 0} and goodput.read(tmp_path) == seconds
  assert goodput.text(seconds) == (
    'goodput: 67.8% of 0:00:59 in steps; data 16.9% compile 0.0% saving 6.8% evaluation 0.0% '
    'other 0.0% start-up 8.5% restart 0.0%'
  )


def test_steps_that_are_done_anew_are_no_goodput(tmp_path):
  start(tmp_path, 5, kill_after=7)  # 3 steps after the save of step 4
  kept = goodput.read(tmp_path)
  assert (kept['steps'], kept['start-up'], kept['restart']) == (16, 5, 3 * 4)
  assert sum(kept.values()) == 5 + 7 * 5 + 2
  again = start(tmp_path, 6)
  assert (again['start-up'], again['restart']) == (5, 12 + 6)


def test_a_start_that_was_killed_before_it_saved_is_lost_whole(tmp_path):
  start(tmp_path, 5, kill_after=3)
  kept = goodput.read(tmp_path)
  assert (kept['steps'], kept['start-up'], kept['restart']) == (0, 5, 12)


@pytest.mark.parametrize(
  'text', [None, '', '[]', '{"all": {}}', json.dumps({'all': 3, 'saved': 4})]
)
def test_without_a_file_of_ours_counting_starts_anew(tmp_path, text):
  if text is not None:
    (tmp_path / goodput.NAME).write_text(text)
  assert goodput.read(tmp_path) == dict.fromkeys(goodput.KEYS, 0.0)


def test_what_a_finished_run_does_behind_its_loop_is_added(tmp_path):
  before = start(tmp_path, 5)
  spent = {'evaluation': 7.0, 'other': 1.0}
  after = goodput.add(tmp_path, 10, spent)
  assert after == before | spent and goodput.read(tmp_path) == after
  assert goodput.add(tmp_path, 10, spent) == goodput.read(tmp_path) == after  # started again
  further = start(tmp_path, 5)  # a run that is prolonged is evaluated anew
  assert goodput.add(tmp_path, 20, spent)['evaluation'] == further['evaluation'] + 7 == 14


def test_a_report_that_was_killed_is_counted_by_the_next_start(tmp_path):
  before = start(tmp_path, 5)
  assert goodput.add(tmp_path, 10, {'evaluation': 3.0}) == before | {'evaluation': 3.0}


def test_a_file_without_room_is_said_once_and_the_run_goes_on(tmp_path, caplog):
  (tmp_path / goodput.NAME).mkdir()
  (tmp_path / goodput.NAME / 'in the way').touch()
  assert start(tmp_path, 5)['steps'] == 40
  assert caplog.text.count('goodput.json cannot be written') == 1


def test_only_the_first_process_writes(tmp_path):
  timer = step_timer.StepTimer(1.0, 1.0)
  times = goodput.Goodput([], timer, goodput.read(tmp_path), lambda step: True, lambda step: True)
  times.after_step(loop.StepReport(1, None, None))
  assert not list(tmp_path.iterdir())
