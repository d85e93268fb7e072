"""The commands as people type them; describe has its own file, interrupted runs live in faults/."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_processes')


@pytest.fixture(scope='module')
def env(tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'MOE_JAX_CACHE': str(cache)}


def command(name: str, *arguments: str, env) -> subprocess.CompletedProcess:
  line = [sys.executable, '-m', f'experiments.{name}', *map(str, arguments)]
  return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def workdir(env, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  done = command(
    'train', '--config=configs/smoke.py', f'--workdir={workdir}', '--config.train.num_steps=20',
    env=env,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  # XLA may have its say about a host; we warn of nothing in a run where nothing is wrong.
  assert not re.search('Traceback|Warning|moe_jax', done.stderr), done.stderr
  steps = [line for line in done.stdout.splitlines() if line.startswith('step=')]
  assert [line.split()[0] for line in steps] == ['step=10', 'step=20']
  assert all('tokens/s=' in line and 'mfu=' in line and 'max_vio=' in line for line in steps)
  assert f'{workdir}/plots/loss.png' in done.stdout
  return workdir


@pytest.mark.slow
def test_evaluate_prints_one_json_object(workdir, env):
  done = command('evaluate', f'--workdir={workdir}', '--json', env=env)
  assert done.returncode == 0, done.stderr
  record = json.loads(done.stdout)
  keys = ['step', 'loss', 'bits_per_byte', 'max_vio', 'max_vio_per_layer', 'routing']
  assert list(record) == keys
  final = json.loads((workdir / 'evaluation.json').read_text())
  assert record == {key: final[key] for key in record}


@pytest.mark.slow
def test_generate_prints_one_json_object_and_repeats_itself(workdir, env):
  arguments = (f'--workdir={workdir}', '--prompt=def ', '--max_new_tokens=12', '--seed=3', '--json')
  first, second = (command('generate', *arguments, env=env) for _ in range(2))
  assert first.returncode == 0, first.stderr
  record = json.loads(first.stdout)
  assert list(record) == ['prompt', 'completion', 'tokens', 'tokens_per_second']
  assert record['prompt'] == 'def ' and 0 < len(record['tokens']) <= 12
  assert json.loads(second.stdout)['tokens'] == record['tokens']


@pytest.mark.parametrize(
  'name, arguments, message',
  [
    ('train', ['--config=configs/smoke.py'], '--workdir is missing'),
    ('train', ['--workdir=x'], '--config is missing'),
    (
      'train',
      ['--config=configs/smoke.py', '--workdir=x', '--config.optim.peak_lrr=1'],
      "config.optim.peak_lrr is not a known key; did you mean 'peak_lr'?",
    ),
    (
      'train',
      ['--config=configs/smoke.py', '--workdir=x', '--config.model.moe.num_experts_per_tok=99'],
      'num_experts_per_tok=99 must not exceed model.moe.num_experts=8',
    ),
    (
      'evaluate',
      ['--workdir=/nonexistent'],
      'is neither a run (it holds no checkpoints)',
    ),
    ('generate', ['--workdir=/nonexistent'], '--prompt is missing'),
    (
      'generate',
      ['--workdir=/nonexistent', '--prompt=a', '--top_p=2'],
      '--top_p=2.0 must be above 0 and at most 1',
    ),
  ],
)
def test_bad_input_is_one_line_and_status_2(name, arguments, message, env):
  done = command(name, *arguments, env=env)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert message in done.stderr


@pytest.mark.slow
def test_a_prompt_longer_than_the_context_is_refused(workdir, env):
  done = command('generate', f'--workdir={workdir}', f'--prompt={"x" * 500}', env=env)
  assert done.returncode == 2 and 'more than model.max_seq_len=128' in done.stderr
