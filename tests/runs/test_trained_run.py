"""What a run is loaded with: weights alone, by a process that knows no optimizer."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax.config import parse
from moe_jax.runs import train_run, trained_run
from tests.runs import damaged_step

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


def test_an_older_step_is_loaded_with_its_own_config(trained, tmp_path):
  run, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'run')
  per_tok = run.cfg.model.moe.num_experts_per_tok
  damaged_step.add(workdir, {'model.moe.num_experts_per_tok': per_tok - 1})
  loaded = trained_run.load(workdir)
  assert loaded.step == run.step and loaded.cfg == trained_run.load(workdir, run.step).cfg
  assert loaded.cfg.model.moe.num_experts_per_tok == per_tok
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, run.variables)


def test_an_older_step_is_loaded_although_a_newer_config_has_other_arrays(trained, tmp_path):
  run, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'run')
  damaged_step.add(workdir, {'model.moe.expert_bias.update_rule': 'sign'})
  assert trained_run.load(workdir).step == run.step


def test_loading_imports_no_optimizer(trained):
  command = [sys.executable, '-c', LOAD, str(trained[1])]
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ['2', 'False', 'False']
