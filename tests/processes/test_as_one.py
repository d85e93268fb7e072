"""Several real processes beside one, with eight devices in all."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.runs import train_run, trained_run
from moe_jax.training import evaluate
from tests.processes import launch

pytestmark = pytest.mark.slow

MAKE_MESH = partitioning.make_mesh
# The losses of one process and two differ in the order of float32 sums over eight devices: by 1e-7
# of a loss of 5, as far as seen.
RTOL = 1e-5
# Weights split between the processes, experts within each.
SPLIT = {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 4}


def make(cache: pathlib.Path, **overrides) -> schema.Config:
  page = smoke.get_config()
  page.update_from_flattened_dict(launch.SETTINGS | {'data.cache_dir': str(cache)})
  page.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return parse.from_dict(page.to_dict())


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def two(cache, tmp_path_factory):
  """(workdir, what each of the two processes said)."""
  workdir = tmp_path_factory.mktemp('two')
  settings = SPLIT | {'data.cache_dir': str(cache)}
  return workdir, launch.run(workdir, cache, 2, 4, settings=settings)


@pytest.fixture(scope='module')
def one(cache, tmp_path_factory):
  """(workdir, held-out figures) of one process with eight devices."""
  workdir = tmp_path_factory.mktemp('one')
  trained, corpus = train_run.run_training(make(cache), workdir, say=lambda line: None)
  return workdir, evaluate.evaluate(trained.cfg, trained.variables, corpus, trained.mesh)


def test_two_processes_train_as_one(two, one):
  got, want = (np.array(launch.figures(workdir)) for workdir in (two[0], one[0]))
  assert got.shape == (6, 5)
  np.testing.assert_allclose(got, want, rtol=RTOL)
  assert want[-1, 1] < want[0, 1] - 0.5  # it learns, so equal losses mean equal updates


@pytest.mark.long
def test_four_processes_train_as_one(one, cache, tmp_path):
  """Tokens travel between the processes, to one expert per device."""
  launch.run(tmp_path, cache, 4, 2, settings={'mesh.data': 1, 'mesh.expert': 8})
  got, want = (np.array(launch.figures(workdir)) for workdir in (tmp_path, one[0]))
  np.testing.assert_allclose(got, want, rtol=RTOL)


def test_evaluation_at_the_end_is_that_of_one_process(two, one):
  got, want = json.loads((two[0] / 'evaluation.json').read_text()), one[1]
  assert got['bits_per_byte'] == pytest.approx(want.bits_per_byte, rel=RTOL)
  assert got['max_vio_per_layer'] == pytest.approx(want.max_vio_per_layer, rel=RTOL)


def test_only_the_first_process_says_and_writes(two):
  workdir, (first, second) = two
  assert second == ''
  assert 'processes=2 mesh=fsdp:2,expert:4' in first
  assert sum(line.startswith('step=') for line in first.splitlines()) == 6
  assert 'sample' not in first  # the prompt is empty
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  assert not list(workdir.glob('.seen-*'))
  assert (workdir / 'plots' / 'loss.png').exists()


def test_a_checkpoint_of_two_processes_goes_on_in_one(two, cache, tmp_path, monkeypatch):
  """From eight devices of two processes to two of one; the data goes on where it was."""
  workdir = pathlib.Path(shutil.copytree(two[0], tmp_path / 'run'))
  shutil.rmtree(workdir / 'checkpoints' / '6')
  devices = jax.devices()[:2]
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, devices))
  lines = []
  train_run.run_training(make(cache, mesh__data=2), workdir, say=lines.append)
  assert 'resuming after step 3 of 6' in lines
  assert 'placement changed: mesh.fsdp: 2 -> 1' in lines
  got, want = (np.array(launch.figures(w)) for w in (workdir, two[0]))
  np.testing.assert_array_equal(got[:3], want[:3])
  np.testing.assert_allclose(got[3:], want[3:], rtol=RTOL)
  assert trained_run.load(workdir).step == 6


def test_a_bad_batch_of_one_process_is_skipped_and_counted_by_all(cache, tmp_path):
  """Parameters lie in shards on both; after the bad step each still has its own, bit by bit."""
  settings = SPLIT | {'train.num_steps': 4, 'checkpoint.save_every': 4}
  module = 'tests.processes.poisoned_train'
  said = launch.run(tmp_path, cache, 2, 4, settings=settings, module=module)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['skipped_steps'] for line in lines] == [0, 0, 1, 1]
  assert [line['step'] for line in lines if line['loss'] is None] == [3]
  for out in said:
    states = dict(re.findall(r'state (\d) (\w+)', out))
    assert list(states) == ['1', '2', '3', '4']
    assert states['1'] != states['2'] == states['3'] != states['4']


@pytest.mark.long
def test_a_bad_batch_of_one_process_leaves_copies_equal(cache, tmp_path):
  """Without sharding both processes hold whole parameters, which stay the same bit by bit."""
  settings = {'train.num_steps': 4, 'checkpoint.save_every': 4}
  module = 'tests.processes.poisoned_train'
  first, second = launch.run(tmp_path, cache, 2, 1, settings=settings, module=module)
  states, others = (dict(re.findall(r'state (\d) (\w+)', out)) for out in (first, second))
  assert states == others and states['2'] == states['3'] != states['4']


def test_rows_and_errors_between_processes(cache, tmp_path):
  env = launch.environment(cache, JAX_NUM_CPU_DEVICES='2')
  env['PYTHONPATH'] = str(launch.ROOT)
  script = str(pathlib.Path(__file__).parent / 'two_children.py')
  command = [sys.executable, script, f'127.0.0.1:{launch.free_port()}']
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  started = [
    subprocess.Popen([*command, str(i), str(tmp_path)], env=env, **pipes) for i in range(2)
  ]
  found = []
  for status, out, err in launch.join(started):
    assert status == 0, err
    found.append(json.loads(out.splitlines()[-1]))
  parts = {name: [f[name] for f in found] for name in found[0]}
  assert parts['neighbours'] == [[0, 1], [2, 3]]
  assert parts['interleaved'] == [[0, 2], [1, 3]]
  assert parts['tensor_across'] == [[0, 1], [0, 1]]  # both hold a half of every row's features
  assert parts['sequence_across'] == [[0], [0]]
  message = 'the disk of this one is full'
  assert parts['alone'] == [f'process 1: {message}', message]
  assert parts['all'] == ['the same everywhere'] * 2
  assert parts['same'] == parts['shared'] == ['', '']
  assert all(
    'the text is not the same on process 0 and on process 1;' in t for t in parts['differs']
  )
  assert all('own' in text and 'on process 1 is not the directory' in text for text in parts['own'])


def test_a_missing_process_is_named(cache, tmp_path):
  """Before anything is written; `test_rendezvous.py` has the other cases, without JAX."""
  workdir = tmp_path / 'run'
  started = launch.start(workdir, cache, 2, 1, '--start_timeout=1', only=range(1))
  ((status, out, err),) = launch.join(started)
  assert (status, out) == (2, '')
  assert err.startswith('error: process 1 of 2 has not come within --start_timeout=1 seconds')
  assert err.count('\n') == 1, err
  assert not workdir.exists()
