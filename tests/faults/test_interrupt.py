"""Real processes, really killed: the resumed run repeats the unbroken one bit by bit."""

import signal
import subprocess

import pytest

from experiments.torture import kills

pytestmark = pytest.mark.usefixtures('quick_processes')
NUM_STEPS = 600
SETTINGS = [
  '--config=configs/smoke.py',
  f'--config.train.num_steps={NUM_STEPS}',
  '--config.train.log_every=1',
  '--config.checkpoint.save_every=25',
  '--config.train.sample_prompt=',
]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('scenes')  # with the programs that all scenes share


def finish(scene: kills.Scene) -> str:
  assert scene.train().wait(300) == 0, scene.log.read_text()
  return scene.log.read_text()


def start_until(step: int, scene: kills.Scene) -> subprocess.Popen:
  process = scene.train()
  reached = kills.Phase(lambda: len(scene.lines()) >= step, over=lambda: False, usual=0.0)
  assert kills.wait(process, reached), 'no progress'
  assert process.poll() is None, scene.log.read_text()
  return process


@pytest.fixture(scope='module')
def unbroken(root):
  scene = kills.Scene(root / 'unbroken', SETTINGS)
  finish(scene)
  result = scene.figures()
  assert [r[0] for r in result] == list(range(1, NUM_STEPS + 1))
  return result


@pytest.mark.slow
@pytest.mark.parametrize('stop', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_says_how_to_resume(unbroken, root, stop):
  scene = kills.Scene(root / stop.name, SETTINGS)
  process = start_until(60, scene)
  process.send_signal(stop)
  assert process.wait(120) == 128 + stop, scene.log.read_text()  # 0 is a finished run
  done, said = len(scene.lines()), scene.log.read_text()
  assert 60 <= done < NUM_STEPS
  assert f'stopped by {stop.name} after step {done}' in said
  assert f'resume with: python -m experiments.train {SETTINGS[0]}' in said
  assert str(done) in scene.names('checkpoints')
  assert f'resuming after step {done} of {NUM_STEPS}' in finish(scene)
  assert scene.figures() == unbroken


@pytest.mark.slow
def test_a_run_killed_again_and_again_repeats_the_unbroken_one(unbroken, root):
  scene = kills.Scene(root / 'killed', SETTINGS)
  for step in (10, 40, 130):  # the first comes before any checkpoint
    process = start_until(step, scene)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(scene.lines()) < NUM_STEPS
  assert 'resuming after step' in finish(scene)
  assert scene.figures() == unbroken
