"""Several real processes, each with a disk of its own, whose run lies in a bucket.

One protocol will do: both have the same calls under them, which tests/storage tries on each.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.runs import metric_log, run_place, trained_run
from moe_jax.storage import fetch
from tests.processes import launch
from tests.storage import conftest as storage

NUM_STEPS = 40
# Weights split between the processes, so that each holds a part of a checkpoint.
SETTINGS = {
  'mesh.data': 1,
  'mesh.fsdp': 4,
  'train.num_steps': NUM_STEPS,
  'checkpoint.save_every': 10,
  'checkpoint.keep_last': 2,
}
# The train command, with less time between uploads and looks at the lease; a process with CUT in
# its environment cannot hand its parts over.
COMMAND = """
import os, sys
from experiments import train
from experiments.common import cli
from moe_jax import errors
from moe_jax.storage import lease, parts, workdir
workdir.EVERY, lease.EVERY = 0.2, 0.5
if os.environ.get('CUT'):
  def cut(*unused):
    raise errors.InputError('the network is cut')
  parts.PATIENCE, parts.Parts._give = 0.0, cut
sys.argv[0] = 'train'
cli.run(train.main, train.define_flags)
"""

objects, server = storage.objects, storage.server


def start(
  address: str,
  disks: pathlib.Path,
  settings: dict | None = None,
  processes: int = 2,
  cut: int = -1,
) -> list[subprocess.Popen]:
  """One process per disk, which is its cache and its working directory; `cut` is one of them."""
  values = launch.SETTINGS | SETTINGS | (settings or {})
  command = [sys.executable, '-c', COMMAND, '--config=smoke', f'--workdir={address}']
  command += [f'--config.{key}={value}' for key, value in values.items()]
  command += [f'--num_processes={processes}', '--heartbeat_timeout=20']
  command += [f'--coordinator=127.0.0.1:{launch.free_port()}']
  made = []
  for i in range(processes):
    disk = disks / str(i)
    disk.mkdir(parents=True, exist_ok=True)
    env = launch.environment(disk / 'cache', JAX_NUM_CPU_DEVICES=str(4 // processes))
    env |= {'PYTHONPATH': str(launch.ROOT), 'CUT': 'yes' if i == cut else ''}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    made.append(subprocess.Popen([*command, f'--process_id={i}'], cwd=disk, env=env, **pipes))
  return made


def finished(processes: list[subprocess.Popen]) -> list[str]:
  found = launch.join(processes)
  for number, (status, out, err) in enumerate(found):
    assert status == 0, f'process {number}: {out}\n{err}'
  return [out for _, out, _ in found]


def result(workdir: str | pathlib.Path) -> tuple:
  """(losses by step, checksums of the last step) of a run."""
  here = fetch.local(workdir)
  losses = [(point['step'], point['loss']) for point in metric_log.read_metrics(here)]
  with trained_run.reader(here) as reader:
    return losses, reader.read_record(NUM_STEPS)['leaves']


@pytest.fixture(scope='module')
def common(tmp_path_factory) -> tuple:
  """`result` of two processes that share a disk."""
  root = tmp_path_factory.mktemp('common')
  launch.run(root / 'run', root / 'cache', 2, 2, settings=SETTINGS)
  return result(root / 'run')


def wait_for(filesystem, name: str, processes: list[subprocess.Popen]):
  deadline = time.monotonic() + launch.TIMEOUT
  while not (filesystem.invalidate_cache() or filesystem.exists(name)):
    assert all(p.poll() is None for p in processes), launch.join(processes)
    assert time.monotonic() < deadline, 'no progress'
    time.sleep(0.05)


def steps(filesystem) -> list[int]:
  """The whole steps in the bucket."""
  filesystem.invalidate_cache()
  ends = filesystem.glob(f'tests/run/checkpoints/*/{fetch.LAST}')
  return sorted(int(name.split('/')[-2]) for name in ends)


def test_one_process_has_the_folder_itself_or_its_mirror(objects, tmp_path):
  with run_place.opened(tmp_path, '--workdir', print) as place:
    assert place == (tmp_path, None)
  with run_place.opened('gs://tests/run', '--workdir', print) as place:
    assert place.parts is None and place.path.is_relative_to(tmp_path / 'cache')
    (place.path / 'config.json').write_text('{}')
  assert objects.cat_file('tests/run/config.json') == b'{}'


@pytest.mark.slow
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_killed_processes_go_on_from_the_bucket_alone(server, common, tmp_path):
  address, filesystem = server
  disks = tmp_path / 'disks'
  processes = start(f'{address}/run', disks)
  wait_for(filesystem, f'tests/run/checkpoints/10/{fetch.LAST}', processes)
  for process in processes:
    process.send_signal(signal.SIGKILL)
  assert [status for status, _, _ in launch.join(processes)] == [-signal.SIGKILL] * 2
  shutil.rmtree(disks)
  first, second = finished(start(f'{address}/run', disks))
  assert 'resuming after step' in first and second == ''
  assert result(f'{address}/run') == common
  names = {name.removeprefix('tests/run/') for name in filesystem.find('tests/run')}
  hidden = {name for name in names if '.' in name.partition('/')[0][:1]}
  assert hidden == {fetch.SESSION}
  assert {name.split('/')[1] for name in names if name.startswith('checkpoints/')} == {'30', '40'}
  assert not list((disks / '1').glob('cache/buckets/workdirs/*'))
  longer = start(f'{address}/run', tmp_path / 'alone', {'train.num_steps': NUM_STEPS + 1}, 1)
  (out,) = finished(longer)
  assert f'resuming after step {NUM_STEPS} of {NUM_STEPS + 1}' in out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_one_is_killed_and_all_go_on_with_the_folders_that_they_have(server, common, tmp_path):
  address, filesystem = server
  processes = start(f'{address}/run', tmp_path)
  wait_for(filesystem, f'tests/run/checkpoints/10/{fetch.LAST}', processes)
  processes[1].send_signal(signal.SIGKILL)
  (status, _, error), (killed, _, _) = launch.join(processes)
  assert killed == -signal.SIGKILL and status == 1 and 'process 1' in error
  first, second = finished(start(f'{address}/run', tmp_path))
  assert 'resuming after step' in first and second == ''
  assert result(f'{address}/run') == common


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_a_signal_to_one_stops_all_after_the_same_step(server, tmp_path):
  address, filesystem = server
  processes = start(f'{address}/run', tmp_path)
  wait_for(filesystem, f'tests/run/checkpoints/10/{fetch.LAST}', processes)
  processes[1].send_signal(signal.SIGTERM)
  (status, out, _), (other, said, _) = launch.join(processes)
  assert status == other == 128 + signal.SIGTERM
  done = steps(filesystem)[-1]
  assert said == '' and 10 < done < NUM_STEPS
  assert f'stopped by SIGTERM after step {done}, which is saved' in out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_a_part_that_cannot_be_handed_over_ends_all_with_the_name(server, tmp_path):
  address, filesystem = server
  processes = start(f'{address}/run', tmp_path, cut=1)
  (status, _, error), (cut, _, own) = launch.join(processes)
  assert (status, cut) == (1, 2)
  assert 'error: the network is cut' in own.splitlines()
  assert 'error: process 1 (' in error and 'ended: the network is cut' in error
  assert steps(filesystem) == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_a_lease_that_was_taken_over_ends_all(server, tmp_path):
  address, filesystem = server
  processes = start(f'{address}/run', tmp_path, {'train.num_steps': 100_000})
  wait_for(filesystem, f'tests/run/checkpoints/10/{fetch.LAST}', processes)
  filesystem.pipe_file('tests/run/.lease/99', b'')
  (status, _, error), (other, _, words) = launch.join(processes)
  assert (status, other) == (2, 2)
  assert 'was taken over by another process' in error.splitlines()[-1]
  assert 'error: process 0: ' in words and 'was taken over by another process' in words


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_a_second_run_is_refused_by_all_of_its_processes(server, tmp_path):
  address, filesystem = server
  claim = {'host': 'other', 'process': 1, 'machine': '', 'until': time.time() + 1000}
  filesystem.pipe_file('tests/run/.lease/1', json.dumps(claim).encode())
  (status, _, error), (other, _, words) = launch.join(start(f'{address}/run', tmp_path))
  assert (status, other) == (2, 2)
  assert "is being written by process 1 of 'other'" in error
  assert "process 0: --workdir=gs://tests/run is being written by process 1 of 'other'" in words
