import json
import os
import subprocess
import sys

import pytest
from absl import flags

from experiments.common import local_jobs
from moe_jax import errors

MODULE = """
import json, os, pathlib, sys, threading, time
time.sleep(0.2)  # by now its parent has set it on its cores
found = []
thread = threading.Thread(target=lambda: found.append(sorted(os.sched_getaffinity(0))))
thread.start()
thread.join()
shard = next(arg for arg in sys.argv if arg.startswith('--shard='))
pathlib.Path(sys.argv[1], shard).write_text(json.dumps(found[0]))
sys.exit(3 if '--fail' in sys.argv and shard == '--shard=1' else 0)
"""

SLOW_TO_START = """
import pathlib, sys, time
from absl import app, flags
from experiments.common import local_jobs

def main(_):
  done = pathlib.Path(flags.FLAGS.done)
  time.sleep(max(0, flags.FLAGS.shard))  # shard 0 would be through before shard 1 looks
  left = [name for name in 'abcd' if not (done / name).exists()]

  def train(name):
    with (done / name).open('a') as file:
      file.write(str(flags.FLAGS.shard))

  local_jobs.run('slow_to_start', left, train)

flags.DEFINE_string('done', '', '')
local_jobs.define_flags()
app.run(main)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
  """Calls `run` with --jobs=2 on a module that writes down its cores."""
  (tmp_path / 'shard_cores.py').write_text(MODULE)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  monkeypatch.setattr(sys, 'argv', ['command', str(tmp_path)])
  values = flags.FlagValues()
  flags.DEFINE_integer('jobs', 2, '', flag_values=values)
  flags.DEFINE_integer('shard', -1, '', flag_values=values)
  values(['command'])
  monkeypatch.setattr(local_jobs.flags, 'FLAGS', values)
  return lambda *more: local_jobs.run('shard_cores', [0, 1, 2], pytest.fail, more)


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='cores are not set here')
def test_each_process_and_its_threads_stay_on_their_own_cores(jobs, tmp_path, capsys):
  before = os.sched_getaffinity(0)
  jobs()
  found = [json.loads((tmp_path / f'--shard={i}').read_text()) for i in range(2)]
  assert os.sched_getaffinity(0) == before
  assert sorted(found[0] + found[1]) == sorted(before) * (2 if len(before) == 1 else 1)
  assert len(before) == 1 or not set(found[0]) & set(found[1])
  line = capsys.readouterr().err
  assert line.startswith('--jobs=2: processes on cores ') and line.count('\n') == 1
  for cores in found:
    assert ','.join(map(str, cores)) in line


@pytest.mark.parametrize('words', [['-1', '3'], ['3', '-1'], ['-2']])
def test_negative_seeds_are_refused(words):
  with pytest.raises(errors.InputError, match=f'--seeds={",".join(words)} must be at least 0'):
    local_jobs.seeds(words)


def test_what_more_processes_cost_is_said():
  assert 'wait for each other' not in local_jobs.cost([[0, 2], [1]])
  assert '--jobs=2: processes on cores 0,2 | 1; a single run' in local_jobs.cost([[0, 2], [1]])
  assert 'fewer cores than processes: they wait for each other' in local_jobs.cost([[0], [0]])
  assert 'whose cores this system does not set' in local_jobs.cost([[], []])


def test_a_process_that_fails_is_an_error(jobs):
  with pytest.raises(errors.InputError, match='a shard failed'):
    jobs('--fail')


def test_none_begins_before_all_know_what_is_left(tmp_path, monkeypatch):
  (tmp_path / 'slow_to_start.py').write_text(SLOW_TO_START)
  (tmp_path / 'b').write_text('trained before')
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
  command = [sys.executable, '-m', 'slow_to_start', f'--done={tmp_path}', '--jobs=2']
  subprocess.run(command, check=True, timeout=120)
  assert [(tmp_path / name).read_text() for name in 'abcd'] == ['0', 'trained before', '1', '0']
