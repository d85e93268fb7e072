"""The long form of these tests, `python -m experiments.torture`: its judgement, and a short run."""

import json
import pathlib
import random
import signal
import subprocess
import time

import pytest

from experiments.torture import damage, fuzz, kills
from moe_jax import errors


def test_every_damage_changes_the_file(tmp_path):
  path, whole = tmp_path / 'file', bytes(range(9))
  found = set()
  for how in damage.DAMAGES:
    path.write_bytes(whole)
    damage.harm(path, how)
    found.add(path.read_bytes() if path.exists() else None)
  assert len(found) == len(damage.DAMAGES) and whole not in found
  path.write_bytes(b'')
  damage.harm(path, 'middle byte')  # an empty file has no byte to flip
  assert path.read_bytes() == b''


def test_every_file_is_damaged_before_one_is_again_and_in_another_way():
  files = [pathlib.Path(name) for name in 'abc']
  drawn = damage.cases(files, random.Random(0), 3 * 10 - 1)
  assert [file for file, _ in drawn] == [*files * 9, *files[:2]]
  of_a = [how for file, how in drawn if file.name == 'a']
  assert set(of_a[:8]) == set(damage.DAMAGES) and len(set(of_a)) == 10


def test_a_byte_is_flipped_anywhere(tmp_path):
  path, whole = tmp_path / 'file', bytes(range(9))
  path.write_bytes(whole)
  damage.harm(path, 'byte at 0.250000')  # of the places 0 to 8 it is 2
  assert path.read_bytes() == b'\0\1\3' + whole[3:]


def test_other_arrays_are_silent_and_only_one_line_is_noticed():
  def fail(error):
    def read():
      raise error

    return read

  assert damage.judge(lambda: 'a', 'a')[0] == 'harmless'
  assert damage.judge(lambda: 'b', 'a')[0] == 'silent'
  assert damage.judge(fail(errors.InputError('one line')), 'a')[0] == 'noticed'
  assert damage.judge(fail(errors.InputError('two\nlines')), 'a')[0] == 'traceback'
  assert damage.judge(fail(KeyError('leaf')), 'a') == ('traceback', "KeyError: 'leaf'")


def test_other_metrics_arrays_and_files_break_the_promise(tmp_path, monkeypatch):
  whole, scene = kills.Scene(tmp_path / 'unbroken'), kills.Scene(tmp_path / 'round0')
  for one in (whole, scene):
    one.workdir.mkdir()
    one.cache.mkdir()
    (one.workdir / 'metrics.jsonl').write_text(
      '{"step": 1, "loss": 2.5, "lr": 1, "grad_norm": 1, "max_vio": 0, "seconds": 3}\n'
    )
  state = {'w': b'12'}
  monkeypatch.setattr(kills, 'final_state', lambda workdir: state)
  want, broken = (whole.figures(), {'w': b'12'}), []
  kills._compare(scene, whole, want, broken)
  assert not broken
  state['w'] = b'13'
  text = (scene.workdir / 'metrics.jsonl').read_text()
  (scene.workdir / 'metrics.jsonl').write_text(text.replace('2.5', '2.5000000000000004'))
  (scene.cache / '.tokens.npy.7.tmp').touch()
  kills._compare(scene, whole, want, broken)
  words = ('1 of 1 steps', '1 arrays', 'left behind', 'files that the unbroken')
  assert len(broken) == 4 and all(word in line for word, line in zip(words, broken))


class Process:
  """Ends at its `polls`-th poll."""

  def __init__(self, polls: int):
    self.polls = polls

  def poll(self):
    self.polls -= 1
    return None if self.polls > 0 else 0


def test_a_kill_falls_into_its_phase_or_at_its_end(monkeypatch):
  asked = []

  def phase(begin: int, end: int) -> kills.Phase:
    asked.clear()
    return kills.Phase(lambda: len(asked) >= begin, lambda: asked.append(1) or len(asked) > end, 1)

  process = Process(polls=50)
  assert kills.wait(process, phase(begin=3, end=99))
  assert len(asked) == 4 and process.polls > 40
  assert kills.wait(process, phase(begin=3, end=6), delay=60.0) and len(asked) == 7
  assert kills.wait(process, phase(begin=99, end=999)) and process.polls == 0  # it ended itself
  monkeypatch.setattr(kills, 'PATIENCE', 0.01)
  assert not kills.wait(Process(polls=999), phase(begin=99, end=999))


def test_rounds_of_several_commands_add_up():
  first = {'by_phase': {'save, SIGKILL': 2, 'step, SIGTERM': 1}, 'steps_again': 3, 'refused': 0}
  second = {'by_phase': {'save, SIGKILL': 1}, 'steps_again': 4, 'refused': 1}
  total = kills._total([first, second])
  assert (total['kills'], total['rounds'], total['steps_again'], total['refused']) == (4, 2, 7, 1)
  rows = kills.table(total['by_phase']).splitlines()
  assert rows[2:] == ['| save | 3 | 0 |', '| step | 0 | 1 |']


def test_a_process_that_hangs_is_ended(monkeypatch):
  monkeypatch.setattr(kills, 'PATIENCE', 0.01)
  assert kills._end(subprocess.Popen(['sleep', '60'])) == -signal.SIGKILL
  monkeypatch.setattr(kills, 'PATIENCE', 60)
  assert kills._end(subprocess.Popen(['false'])) == 1


def test_a_config_that_ends_its_process_is_one_finding_and_the_next_are_tried(
  tmp_path, monkeypatch, capsys
):
  def process(line, **unused):
    for number in map(int, line[5:]):
      record = {'number': number, 'router': 'topk', 'error': '', 'changes': ['a: 1 -> 2']}
      (tmp_path / 'stage').write_text(json.dumps(record | {'stage': 'decoding'}))
      if number == 2:
        return subprocess.CompletedProcess(line, -11)
      fuzz._add(tmp_path, record | {'result': 'trained'})
    return subprocess.CompletedProcess(line, 0)

  monkeypatch.setattr(fuzz.subprocess, 'run', process)
  found = fuzz.run(tmp_path, time.monotonic() + 60, seed=0, most=6)
  assert found['configs'] == {'topk: trained': 5, 'topk: crashed': 1}
  (line,) = found['broken']
  assert line == 'config 2: the process ended with status -11 while decoding with a: 1 -> 2'
  assert fuzz.run(tmp_path, time.monotonic() + 60, seed=0, most=6) == found  # nothing is left


@pytest.mark.slow
def test_a_few_kills_and_damages_break_no_promise(tmp_path):
  found = kills.run(tmp_path / 'kills', time.monotonic() + 600, seed=1, most=3)
  assert not found['broken'] and found['kills'] >= 3
  found = damage.run(tmp_path / 'damage', time.monotonic() + 300, seed=1, most=8)
  assert not found['broken'] and found['files']['moe'][0] == 8
  assert sum(found['by_reader']['convert'].values()) == 8
