"""Real processes, really killed: the resumed run repeats the unbroken one bit by bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS = 600
SETTINGS = [
  '--config=configs/smoke.py',
  f'--config.train.num_steps={NUM_STEPS}',
  '--config.train.log_every=1',
  '--config.checkpoint.save_every=25',
  '--config.train.sample_prompt=',
]


@pytest.fixture(scope='module')
def env(tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'MOE_JAX_CACHE': str(cache)}


def start(workdir: pathlib.Path, env) -> subprocess.Popen:
  command = [sys.executable, '-m', 'experiments.train', *SETTINGS, f'--workdir={workdir}']
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def finish(workdir: pathlib.Path, env) -> str:
  process = start(workdir, env)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return out


def lines(workdir: pathlib.Path) -> list[str]:
  path = workdir / 'metrics.jsonl'
  return path.read_text().splitlines() if path.exists() else []


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen):
  deadline = time.monotonic() + 200
  while len(lines(workdir)) < step:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, 'no progress'
    time.sleep(0.01)


def figures(workdir: pathlib.Path) -> list[tuple]:
  """Everything about every step that does not depend on the clock, with all digits."""
  parsed = [json.loads(line) for line in lines(workdir)]
  return [tuple(p[key] for key in ('step', 'loss', 'lr', 'grad_norm', 'max_vio')) for p in parsed]


@pytest.fixture(scope='module')
def unbroken(env, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  finish(workdir, env)
  result = figures(workdir)
  assert [r[0] for r in result] == list(range(1, NUM_STEPS + 1))
  return result


@pytest.mark.slow
@pytest.mark.parametrize('stop', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_says_how_to_resume(unbroken, env, tmp_path, stop):
  process = start(tmp_path, env)
  wait_for_step(tmp_path, 60, process)
  process.send_signal(stop)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  done = len(lines(tmp_path))
  assert 60 <= done < NUM_STEPS
  assert f'stopped by {stop.name} after step {done}' in out
  assert f'resume with: python -m experiments.train {SETTINGS[0]}' in out
  assert (tmp_path / 'checkpoints' / str(done)).is_dir()
  assert f'resuming after step {done} of {NUM_STEPS}' in finish(tmp_path, env)
  assert figures(tmp_path) == unbroken


@pytest.mark.slow
def test_a_run_killed_again_and_again_repeats_the_unbroken_one(unbroken, env, tmp_path):
  for step in (10, 40, 130):  # the first comes before any checkpoint
    process = start(tmp_path, env)
    wait_for_step(tmp_path, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(lines(tmp_path)) < NUM_STEPS
  assert 'resuming after step' in finish(tmp_path, env)
  assert figures(tmp_path) == unbroken
