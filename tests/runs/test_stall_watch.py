"""When a hang is said, with which phase and stacks; on a clock that the test moves."""

import threading
import time
import types

import pytest

from moe_jax.runs import stall_watch
from moe_jax.training import step_timer


@pytest.fixture
def watched(tmp_path):
  """(timer, a list whose one number is the time, the watch, the file it writes to)."""
  now = [100.0]
  timer = step_timer.StepTimer(1.0, 1.0, clock=lambda: now[0])
  with (tmp_path / 'stderr').open('w+') as out:
    yield timer, now, stall_watch.StallWatch(timer, 60.0, clock=lambda: now[0], out=out), out


def said(out):
  out.seek(0)
  return out.read()


def hanging_for_a_file(timer, now, watch):
  with timer.saving():
    now[0] += 61
    return watch.look()


def test_a_hang_is_said_with_its_phase_and_stacks(watched):
  timer, now, watch, out = watched
  assert hanging_for_a_file(timer, now, watch)
  text = said(out)
  assert 'for 61 s' in text and "in phase 'saving'" in text and 'stall_seconds=60' in text
  assert 'hanging_for_a_file' in text  # the stack of this very thread


@pytest.mark.parametrize('phase', ['compile', 'evaluation', 'data'])
def test_each_phase_has_its_name(watched, phase):
  timer, now, watch, out = watched
  with timer.waiting() if phase == 'data' else timer.paused(phase):
    now[0] += 60
    assert watch.look()
  assert f'in phase {phase!r}' in said(out)


def test_steps_and_new_phases_are_progress(watched):
  timer, now, watch, out = watched
  for _ in range(5):
    now[0] += 50
    timer.add_tokens(1)
    assert not watch.look()
  now[0] += 50
  with timer.waiting():
    now[0] += 50
    assert not watch.look()
  now[0] += 59
  assert not watch.look() and said(out) == ''
  now[0] += 1
  assert watch.look() and "in phase 'steps'" in said(out)


def test_a_hang_is_said_once_in_that_time(watched):
  _, now, watch, _ = watched
  seen = []
  for _ in range(19):
    now[0] += 10
    seen.append(watch.look())
  assert [i for i, one in enumerate(seen) if one] == [5, 11, 17]  # after 60, 120 and 180 s


def test_the_thread_looks_and_ends(watched):
  timer, now, _, out = watched
  with stall_watch.StallWatch(timer, 0.05, clock=lambda: now[0], out=out):
    now[0] += 1
    deadline = time.monotonic() + 20
    while 'nothing has gone on' not in said(out) and time.monotonic() < deadline:
      time.sleep(0.01)
  assert 'nothing has gone on' in said(out)


def test_it_looks_several_times_in_that_time(watched):
  watch, waits = watched[2], []
  watch._over = types.SimpleNamespace(wait=lambda seconds: waits.append(seconds) or len(waits) > 2)
  watch._watch()
  assert waits == [60.0 / stall_watch._LOOKS] * 3 and stall_watch._LOOKS > 1


def test_zero_is_off(watched):
  timer, _, _, out = watched
  before = threading.active_count()
  with stall_watch.StallWatch(timer, 0.0, out=out):
    assert threading.active_count() == before
