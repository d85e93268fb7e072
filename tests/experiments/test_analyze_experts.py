"""The command on a short run: what it writes, says and refuses."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
  '--config.train.num_steps=8',
  '--config.train.sample_tokens=0',
  '--config.optim.warmup_steps=2',
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('quick_processes')]


def command(name, *arguments, cache):
  env = os.environ | {'MOE_JAX_CACHE': str(cache)}
  words = [sys.executable, '-m', f'experiments.{name}', *arguments]
  return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A function of a page: its short run, with two checkpoints; and the cache."""
  root = tmp_path_factory.mktemp('analyze')

  def train(page):
    workdir = root / page.replace(':', '_')
    arguments = [f'--config=configs/{page}', f'--workdir={workdir}', *SMALL]
    done = command('train', *arguments, '--config.checkpoint.save_every=4', cache=root / 'cache')
    assert done.returncode == 0, done.stderr
    return workdir

  return train, root / 'cache'


def test_all_probes_of_a_run(runs):
  train, cache = runs
  workdir = train('smoke.py')
  done = command('analyze_experts', f'--workdir={workdir}', '--tokens=1024', cache=cache)
  assert done.returncode == 0, done.stderr
  out = workdir / 'experts'
  names = {path.stem for path in out.glob('*.png')}
  assert {'disable_top', 'drop_shared', 'fewer_experts', 'saturation', 'vocabulary'} <= names
  text = (out / 'report.md').read_text()
  assert text.startswith('# What the experts learned: step 8')
  assert all(f'({name}.png)' in text for name in names)
  with np.load(out / 'experts.npz') as arrays:
    assert arrays['saturation.steps'].tolist() == [4]
    assert arrays['fewer_experts.num_experts_per_tok'].tolist() == [1, 2, 3]
  found = command(
    *('analyze_experts', f'--workdir={workdir}', '--probe=confidence,traffic'),
    *('--tokens=256', '--json', f'--out={workdir / "other"}'),
    cache=cache,
  )
  record = json.loads(found.stdout)
  assert set(record['readings']) == {'confidence', 'traffic'} and not record['skipped']
  wrong = command('analyze_experts', f'--workdir={workdir}', '--probe=domain', cache=cache)
  assert wrong.returncode == 2 and "did you mean 'domains'" in wrong.stderr


def test_a_dense_run_is_refused(runs):
  train, cache = runs
  done = command('analyze_experts', f'--workdir={train("smoke.py:dense")}', cache=cache)
  assert done.returncode == 2 and 'dense model' in done.stderr
