import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys
import jax
from moe_jax.devices import compile_cache

directory = compile_cache.enable(sys.argv[1])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.jit(lambda x: x * 2 + 1)(1.0)
print(directory)
"""


def enable(root: pathlib.Path, **env: str) -> pathlib.Path:
  clean = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  env = clean | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)} | env
  command = [sys.executable, '-c', SCRIPT, str(root)]
  return pathlib.Path(subprocess.check_output(command, env=env, text=True).strip())


def test_programs_are_kept_below_the_root(tmp_path):
  directory = enable(tmp_path)
  assert directory.parent == tmp_path and any(directory.iterdir())


def test_the_users_own_choice_stands(tmp_path):
  assert enable(tmp_path / 'a', JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'b')) == tmp_path / 'b'
  assert not (tmp_path / 'a').exists()
