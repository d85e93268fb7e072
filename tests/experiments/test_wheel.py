"""The commands of an installed wheel, from a folder that holds nothing of this repository."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip('setuptools', minversion='70.1')  # makes wheels by itself

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_processes')


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> pathlib.Path:
  """A wheel, built from a copy of the tree and unpacked."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  listed = subprocess.check_output(['git', 'ls-files'], cwd=ROOT, text=True).splitlines()
  for name in listed:
    if name.endswith('.py') or name in ('README.md', 'pyproject.toml', 'LICENSE'):
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      (source / name).write_bytes((ROOT / name).read_bytes())
  pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
  subprocess.run([*pip, '-w', str(folder), str(source)], check=True)
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / 'site')
  return folder / 'site'


def command(installed: pathlib.Path, cwd: pathlib.Path, *arguments: str) -> str:
  env = os.environ | {'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu', 'PYTHONSAFEPATH': '1'}
  line = [sys.executable, '-m', *arguments]
  done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_every_module_is_in_the_wheel(installed):
  for package in ('moe_jax', 'configs', 'experiments'):
    ours = {path.relative_to(ROOT) for path in (ROOT / package).rglob('*.py')}
    theirs = {path.relative_to(installed) for path in (installed / package).rglob('*.py')}
    assert ours == theirs


@pytest.mark.slow
def test_commands_run_from_another_folder(installed, tmp_path):
  out = command(installed, tmp_path, 'experiments.describe', '--config=quickstart')
  assert 'num_layers' in out
  (tmp_path / 'configs').mkdir()  # a folder of that name is not in the way
  out = command(
    *(installed, tmp_path, 'experiments.train', '--config.train.num_steps=20'),
    *('--config.train.log_every=10', '--config=configs/smoke.py', '--workdir=runs/smoke'),
    f'--config.data.cache_dir={tmp_path}/cache',
  )
  assert 'step=20' in out and (tmp_path / 'runs/smoke/config.json').is_file()
