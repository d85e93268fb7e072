"""The routing zoo's table by hand, its timing, and (slow) the command as it is run."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import routing
from experiments.common import spread, step_rates
from experiments.routing_zoo import table
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_processes')


def result(bits, max_vio, dropped):
  return {'bits_per_byte': bits, 'max_vio': max_vio, 'train_drop_rate': dropped}


@pytest.fixture
def written(tmp_path):
  """(directory, paths) of a table over two routers and two seeds."""
  configs = {
    (name, seed): tiny.make(**({'model__moe__num_experts': 0} if name == 'dense' else {}))
    for seed in (3, 4)
    for name in ('deepseekmoe', 'dense')
  }
  results = {
    'deepseekmoe/3': result(2.0, 0.5, 0.25),
    'deepseekmoe/4': result(2.2, 0.7, 0.35),
    'dense/3': result(1.9, None, None),
    'dense/4': result(2.4, None, None),
  }
  (tmp_path / 'README.md').write_text(f'before\n{table.START}\nold\n{table.END}\nafter\n')
  rates = {'deepseekmoe': 500.0, 'dense': 2000.0}
  return tmp_path, table.write(tmp_path, routing.SUMMARY, configs, results, rates)


def test_table_by_hand(written):
  directory, paths = written
  assert [path.name for path in paths] == ['results.json', 'zoo.png', 'README.md']
  text = (directory / 'README.md').read_text()
  assert text.startswith('before\n') and text.endswith('\nafter\n') and 'old' not in text
  rows = [line for line in text.splitlines() if line.startswith('| `')]
  # Means 2.1 and 2.15; deviations sqrt(2) / 2 times the differences 0.2, 0.5, 0.2 and 10 %.
  want = '| `deepseekmoe` | 2.100 ± 0.141 | 0 | 0.60 ± 0.14 | 30.0 ± 7.1 | 500 |'
  assert rows[0].startswith(want)
  # By seed: 1.9 - 2.0 and 2.4 - 2.2.
  assert rows[1].startswith('| `dense` | 2.150 ± 0.354 | 0.050 ± 0.212 | - | - | 2,000 | 1.00 |')
  assert '| 0.25 |' in rows[0]


def test_results_keep_every_run(written):
  record = json.loads((written[0] / 'results.json').read_text())
  assert record['seeds'] == [3, 4] and len(record['runs']) == 4
  assert {row['name']: row['speed_ratio'] for row in record['rows']} == {
    'deepseekmoe': 0.25,
    'dense': 1.0,
  }


def test_spread_of_one_value_and_of_none():
  assert spread.spread([1.25], 2) == '1.25'
  assert spread.spread([None], 2) == '-' and spread.spread([], 2) == '-'


def test_speed_counts_the_tokens_of_the_steps(monkeypatch):
  monkeypatch.setattr(step_rates, 'ROUNDS', 1)
  monkeypatch.setattr(step_rates, 'STEPS', 2)
  clock = iter([10.0, 10.5])
  monkeypatch.setattr(step_rates.time, 'perf_counter', lambda: next(clock))
  dense = tiny.make(model__moe__num_experts=0, model__num_layers=1, mesh__data=8)
  # 2 steps of 8 rows of 16 tokens in half a second.
  assert step_rates.tokens_per_second({'dense': dense}) == {'dense': 512.0}


@pytest.mark.slow
def test_the_command_trains_and_resumes(tmp_path):
  (tmp_path / 'out').mkdir()
  command = [sys.executable, '-m', 'experiments.routing_zoo', f'--workdir={tmp_path}/runs']
  command += ['--names=deepseekmoe,hash_balanced', '--seeds=0,1', '--steps=21', '--jobs=2']
  command += [f'--out={tmp_path}/out']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True)
  assert done.stdout.count('max_vio_global') == 4
  (tmp_path / 'runs/hash_balanced/1/result.json').unlink()
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True)
  assert done.stdout.count('max_vio_global') == 1
  record = json.loads((tmp_path / 'out/results.json').read_text())
  assert len(record['runs']) == 4
  done = subprocess.run(
    [*command, '--steps=22'], cwd=ROOT, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 2 and 'train.num_steps: 21 -> 22' in done.stderr
