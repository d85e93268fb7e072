"""What a run is loaded with: weights alone, by a process that knows no optimizer."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax.config import parse
from moe_jax.runs import train_run, trained_run

ROOT = pathlib.Path(__file__).parents[2]
LOAD = """
import sys
from moe_jax.runs import trained_run
run = trained_run.load(sys.argv[1])
assert 'gate_up' in run.variables['params']['moe_layers']['moe'], run.variables
print(run.step, 'moe_jax.training.optim' in sys.modules, 'optax' in sys.modules)
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(run, workdir) after two steps of the smoke config."""
  root = tmp_path_factory.mktemp('trained_run')
  page = smoke.get_config('')
  page.update_from_flattened_dict(
    {
      'train.num_steps': 2,
      'optim.warmup_steps': 1,
      'data.cache_dir': str(root / 'cache'),
      'data.synthetic_documents': 120,
    }
  )
  cfg = parse.from_dict(page.to_dict())
  return train_run.run_training(cfg, root / 'run', say=lambda line: None)[0], root / 'run'


def test_loading_gives_the_weights_of_the_last_step(trained):
  run, workdir = trained
  loaded = trained_run.load(workdir)
  assert loaded.step == run.step == 2
  assert jax.tree.structure(loaded.variables) == jax.tree.structure(run.variables)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, run.variables)


def test_loading_imports_no_optimizer(trained):
  command = [sys.executable, '-c', LOAD, str(trained[1])]
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ['2', 'False', 'False']
