"""The command itself, and the manners that all commands share (experiments/common/cli.py)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import describe as describe_lib
from tests import in_process

ROOT = pathlib.Path(__file__).parents[2]

# A command with an overridable config, as experiments/train.py is one.
WITH_OVERRIDES = """
from absl import flags
from experiments.common import cli

def main(argv):
  print(cli.resolve(flags.FLAGS.config).optim.peak_lr)

cli.run(main, cli.config_flag)
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, *arguments]
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def describe(*arguments: str) -> subprocess.CompletedProcess:
  return python('-m', 'experiments.describe', *arguments)


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str):
  assert (result.returncode, result.stdout) == (2, ''), result
  assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result.stderr
  for part in parts:
    assert part in result.stderr


def test_json_of_several_configs():
  specs = ['configs/deepseekmoe_145b.py', 'configs/deepseekmoe_145b.py:half', 'configs/base.py']
  result = describe(*(f'--config={spec}' for spec in specs), '--json')
  assert result.returncode == 0, result.stderr
  described = json.loads(result.stdout)
  assert [d['config'] for d in described] == specs
  assert described[0]['total_params'] == 144_625_356_800
  assert described[1]['train_flops_per_sequence_paper'] == pytest.approx(374.6e12, rel=1e-4)
  assert described[2]['balance_losses']['expert_level'] == {
    'weight': 0.01,
    'scope': 'sequence',
    'value_at_balance': 1.0,
  }


def test_text_for_people():
  result = describe('--config', 'configs/deepseekmoe_2b.py:switch')
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith('A  configs/deepseekmoe_2b.py:switch\n')
  assert '1,967,415,040' in result.stdout
  assert 'MATCHED' not in result.stdout


def test_comparison_for_people():
  specs = ['configs/deepseekmoe_2b.py:switch', 'configs/deepseekmoe_2b.py:gshard']
  result = describe(*(f'--config={spec}' for spec in specs))
  assert result.returncode == 0, result.stderr
  matched = result.stdout.split('\nMATCHED with A\n')[1]
  assert matched.startswith('B  total parameters            equal\n')


V2_BESIDE_67B = [f'--config={ROOT}/configs/deepseek_{name}.py' for name in ('llm_67b', 'v2')]


def test_cache_of_v2_beside_67b(capsys):
  in_process.run(describe_lib, *V2_BESIDE_67B)
  cache = capsys.readouterr().out.split('\nKV CACHE per token, vs A at 16 bits\n')[1]
  lines = cache.split('\n\n')[0].splitlines()
  assert [line.split()[-2:] for line in lines if line.startswith('B')] == [
    ['-82.2', '%'],  # at equal precision
    ['-91.1', '%'],
    ['-93.3', '%'],  # 6 bits against 16: the figure of DeepSeek-V2's abstract
  ]


def test_cache_of_v2_beside_67b_in_json(capsys):
  described = in_process.run_json(capsys, describe_lib, *V2_BESIDE_67B)
  caches = [d['kv_cache_bytes_per_token_by_bits'] for d in described]
  assert caches == [
    {'16': 389_120, '8': 194_560, '6': 145_920},
    {'16': 69_120, '8': 34_560, '6': 25_920},
  ]
  assert described[1]['total_params'] == 235_741_434_880


@pytest.mark.parametrize(
  'arguments, parts',
  [
    ((), ('--config is missing',)),
    (('--config=configs/deepseekmoe_16.py',), ('no such config page', 'deepseekmoe_16b.py')),
    (('--config=configs/base.py', '--jsonn'), ('jsonn',)),
    (('configs/base.py',), ("unexpected argument 'configs/base.py'",)),
  ],
)
def test_errors_are_one_line(arguments, parts):
  assert_one_line_error(describe(*arguments), *parts)


@pytest.mark.parametrize(
  'arguments, parts',
  [
    (
      ('--config=configs/base.py', '--config.optim.peak_lrr=1'),
      ('config.optim.peak_lrr is not a known key', "did you mean 'peak_lr'?"),
    ),
    (('--config=configs/base.py', '--config.optim.peak_lr=fast'), ('peak_lr', "'fast'")),
    (('--config=configs/base.py', '--config.optim.peak_lr=-1'), ('peak_lr=-1.0', 'positive')),
    (('--config.optim.peak_lr=1',), ('--config is missing',)),
  ],
)
def test_override_errors_are_one_line(arguments, parts):
  assert_one_line_error(python('-c', WITH_OVERRIDES, *arguments), *parts)


def test_overrides_reach_the_config():
  result = python('-c', WITH_OVERRIDES, '--config=configs/base.py', '--config.optim.peak_lr=0.5')
  assert (result.returncode, result.stdout) == (0, '0.5\n'), result.stderr
