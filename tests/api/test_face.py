"""`import moe_jax` as a user has it: from another folder, in a fresh process, from a wheel."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import moe_jax

ROOT = pathlib.Path(__file__).parents[2]

IMPORT = """
import json, sys, time
start = time.perf_counter()
import moe_jax
seconds = time.perf_counter() - start
names = dir(moe_jax), moe_jax.__version__, moe_jax.InputError
print(json.dumps([seconds, sorted(m for m in sys.modules if m.split('.')[0] == 'jax'), names[0]]))
"""

LOAD = """
import sys
import moe_jax
try:
  moe_jax.load('nowhere')
except moe_jax.InputError:
  names = ('optax', 'moe_jax.training.optim', 'moe_jax.runs.train_run')
  print([name for name in names if name in sys.modules])
"""

USE = """
import json, pathlib, sys
import moe_jax

assert pathlib.Path(moe_jax.__file__).is_relative_to(sys.argv[1]), moe_jax.__file__
quick = {'train.num_steps': 2, 'optim.warmup_steps': 0, 'data.cache_dir': 'cache'}
moe_jax.train('smoke', 'run', report=False, **quick)
run = moe_jax.load('run')
routing = run.routing('def main')
print(json.dumps({
  'logits': run.logits('def main').shape,
  'text': run.generate(['def main('], max_new_tokens=4),
  'experts': routing.experts.shape,
  'loss': run.evaluate(progress=False).loss,
}))
"""


def python(code: str, folder: pathlib.Path, path: pathlib.Path, *arguments: str) -> str:
  """What a new process prints whose modules come from `path`, started in `folder`."""
  env = os.environ | {'PYTHONPATH': str(path), 'PYTHONSAFEPATH': '1'}
  done = subprocess.run(
    [sys.executable, '-c', code, *arguments], cwd=folder, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_import_is_fast_and_without_jax(tmp_path):
  found = [json.loads(python(IMPORT, tmp_path, ROOT)) for _ in range(3)]
  assert min(seconds for seconds, _, _ in found) < 0.2
  _, loaded, names = found[0]
  assert loaded == [] and set(moe_jax.__all__) <= set(names)


def test_loading_imports_no_optimizer(tmp_path):
  assert python(LOAD, tmp_path, ROOT).strip() == '[]'


def test_every_name_is_there_and_typed():
  """What type checkers see (`if TYPE_CHECKING`) is what a program gets."""
  tree = ast.parse((ROOT / 'moe_jax/__init__.py').read_text())
  (block,) = (node for node in tree.body if isinstance(node, ast.If))
  typed = {alias.name: node.module for node in block.body for alias in node.names}
  assert set(typed) | {'InputError', '__version__'} == set(moe_jax.__all__)
  for name, home in typed.items():
    assert getattr(moe_jax, name) is getattr(sys.modules[home], name)
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    moe_jax.lod  # noqa: B018


@pytest.mark.slow
def test_from_an_installed_wheel(tmp_path):
  """Train, load and use from a folder where nothing of the repository lies."""
  source = tmp_path / 'source'  # a build leaves files behind, which the repository is spared
  for name in ('moe_jax', 'configs', 'experiments'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('setup.py', 'pyproject.toml', 'README.md'):
    shutil.copy(ROOT / name, source / name)
  build = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
  subprocess.run([*build, '-w', tmp_path, source], check=True, timeout=300)
  (wheel,) = tmp_path.glob('*.whl')
  zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
  (tmp_path / 'work').mkdir()
  out = python(USE, tmp_path / 'work', tmp_path / 'site', str(tmp_path / 'site'))
  found = json.loads(out.splitlines()[-1])
  assert found['logits'] == [9, 288] and found['experts'][1] == 9
  assert len(found['text']) == 1 and 4 < found['loss'] < 7
