"""Real processes that are stopped and killed; all of them go on as if nothing had been."""

import signal
import time

import pytest

from moe_jax.training import loop
from tests.processes import launch

NUM_STEPS = 60
SETTINGS = {'train.num_steps': NUM_STEPS, 'checkpoint.save_every': 10}

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def unbroken(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  launch.run(workdir, cache, 2, 2, settings=SETTINGS)
  figures = launch.figures(workdir)
  assert [f[0] for f in figures] == list(range(1, NUM_STEPS + 1))
  return figures


@pytest.mark.parametrize('victim', [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_process_ends_the_others_and_all_go_on(unbroken, cache, tmp_path, victim):
  processes = launch.start(tmp_path, cache, 2, 2, settings=SETTINGS)
  launch.wait_for_step(tmp_path, 25, processes)
  processes[victim].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  (status, _, error), (killed, _, _) = sorted(
    launch.join(processes), key=lambda found: found[0] == -signal.SIGKILL
  )
  assert killed == -signal.SIGKILL and status != 0
  # Sockets close at once, the grace is 2 s, and a heartbeat would take 20.
  assert time.monotonic() - begin < 15
  assert f'error: process {victim} (' in error and 'was killed or has crashed' in error
  assert 'start all processes again' in error
  out = launch.run(tmp_path, cache, 2, 2, settings=SETTINGS)[0]
  assert 'resuming after step' in out
  assert launch.figures(tmp_path) == unbroken


@pytest.mark.parametrize('victim', [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_frozen_process_ends_the_others_with_its_name(cache, tmp_path, victim):
  processes = launch.start(tmp_path, cache, 2, 2, settings=SETTINGS | {'train.num_steps': 100_000})
  launch.wait_for_step(tmp_path, 5, processes)
  processes[victim].send_signal(signal.SIGSTOP)
  begin = time.monotonic()
  try:
    _, error = processes[1 - victim].communicate(timeout=60)
  finally:
    processes[victim].send_signal(signal.SIGCONT)
  assert 15 < time.monotonic() - begin < 30  # the heartbeat is 20
  assert processes[1 - victim].returncode == 1
  (line,) = [line for line in error.splitlines() if line.startswith('error:')]
  assert f'error: process {victim} (' in line and 'has not answered for 2' in line
  assert len(error.splitlines()) < 10  # of JAX's abort there are hundred
  processes[victim].communicate(timeout=60)
  assert (
    processes[victim].returncode != 0
  )  # it ends, by our word or by JAX, whichever it hears first


def test_a_signal_to_one_process_stops_all_after_the_same_step(unbroken, cache, tmp_path):
  processes = launch.start(tmp_path, cache, 2, 2, settings=SETTINGS)
  launch.wait_for_step(tmp_path, 5, processes)
  processes[1].send_signal(signal.SIGTERM)
  (status, out, _), (other, said, _) = launch.join(processes)
  assert (status, other, said) == (128 + signal.SIGTERM, 128 + signal.SIGTERM, '')
  done = len(launch.figures(tmp_path))
  assert 5 <= done < NUM_STEPS
  assert f'stopped by SIGTERM after step {done}, which is saved' in out
  assert 'resume on every process with: python -m experiments.train' in out
  assert '--process_id' not in out
  assert (tmp_path / 'checkpoints' / str(done)).is_dir()
  out = launch.run(tmp_path, cache, 2, 2, settings=SETTINGS)[0]
  assert f'resuming after step {done} of {NUM_STEPS}' in out
  assert launch.figures(tmp_path) == unbroken


@pytest.mark.long
def test_a_signal_to_one_process_in_an_evaluation_stops_all_after_the_same_step(
  unbroken, cache, tmp_path
):
  """Process 1 alone is sent it, before the second batch of the evaluation after step 25."""
  settings = SETTINGS | {'train.eval_every': 25}
  module = 'tests.processes.signalled_train'
  processes = launch.start(tmp_path, cache, 2, 2, settings=settings, module=module)
  (status, out, _), (other, said, _) = launch.join(processes)
  assert (status, other, said) == (128 + signal.SIGTERM, 128 + signal.SIGTERM, '')
  assert 'step=25 held-out evaluation left unfinished after SIGTERM' in out
  done = len(launch.figures(tmp_path))
  assert 25 <= done <= 25 + loop.MAX_IN_FLIGHT + 1
  assert f'stopped by SIGTERM after step {done}, which is saved' in out
  assert (tmp_path / 'checkpoints' / str(done)).is_dir()
  out = launch.run(tmp_path, cache, 2, 2, settings=settings)[0]
  assert f'resuming after step {done} of {NUM_STEPS}' in out and 'step=50 heldout_loss' in out
  assert launch.figures(tmp_path) == unbroken  # of a run that evaluates nothing on the way


def test_bad_input_of_one_process_ends_all_with_its_words(cache, tmp_path):
  """The second process alone cannot write its cache."""
  (tmp_path / 'file').touch()
  first = launch.start(tmp_path / 'run', cache, 2, 1, only=range(1))
  address = next(argument for argument in first[0].args if argument.startswith('--coordinator='))
  second = launch.start(tmp_path / 'run', tmp_path / 'file', 2, 1, address, only=range(1, 2))
  (status, _, error), (other, _, words) = launch.join(first + second)
  assert (status, other) == (2, 2)
  assert words.startswith('error: config.data.cache_dir: cannot write')
  assert error.startswith('error: process 1: config.data.cache_dir: cannot write')
