"""The launch pages, as far as one machine can follow them: shell, flags, configs, meshes, SLURM."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest
from absl import flags

from experiments.common import cli, train_command
from moe_jax.config import mesh_config, schema
from moe_jax.devices import partitioning
from moe_jax.processes import launch

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / 'docs' / 'launch').glob('*.md'))
SCRIPT = ROOT / 'docs' / 'launch' / 'slurm.sbatch'
# Devices that each page's recipe runs on.
DEVICES = {'tpu_vm': 16, 'gke_xpk': 16, 'slurm': 16, 'colab': 1}


def blocks(page: pathlib.Path, language: str) -> list[str]:
  return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
  """[command, arguments ...] of every `python -m experiments.X`, also inside of quotes."""
  words = shlex.split(text.replace('\n', ' ; ').replace('\\ ; ', ' '), comments=False)
  found = []
  for i, word in enumerate(words):
    if 'experiments.' in word and ' ' in word.strip():
      found += commands(word.partition('=')[2] if word.startswith('--command=') else word)
    is_script = word.endswith('slurm.sbatch')
    if is_script or (word.startswith('experiments.') and words[i - 1] == '-m'):
      name = 'experiments.train' if is_script else word
      end = (j for j, w in enumerate(words) if j > i and w in (';', '>', '&', '&&', '|'))
      found.append([name, *words[i + 1 : next(end, len(words))]])
  return found


COMMANDS = [
  pytest.param(page, command, id=f'{page.stem}-{i}')
  for page in PAGES
  for i, command in enumerate(c for block in blocks(page, 'bash') for c in commands(block))
]


def parsed(name: str, arguments: list[str]) -> schema.Config | None:
  """What the command's own flags make of the arguments; the config if it has one."""
  command, values = importlib.import_module(name), flags.FLAGS
  before, argv = set(values), [name, *arguments]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', argv)  # config_flags reads the overrides there
    try:
      command.define_flags()
      assert cli.parse_flags(argv) == argv[:1], 'words that are no flags'
      return cli.resolve(values.config) if 'config' in values else None
    finally:
      values.remove_flag_values(set(values) - before)


def test_the_pages_are_there_and_short():
  assert [page.stem for page in PAGES] == ['colab', 'gke_xpk', 'slurm', 'tpu_vm']
  for page in PAGES:
    assert len(page.read_text().splitlines()) <= 75, page
    assert len([c for block in blocks(page, 'bash') for c in commands(block)]) >= 1, page


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_shell_and_python_are_well_formed(page):
  for block in blocks(page, 'bash'):
    for text in (block, *re.findall(r"--command='(.*?)'", block, re.DOTALL)):
      done = subprocess.run(['bash', '-n'], input=text, capture_output=True, text=True)
      assert done.returncode == 0 and not done.stderr, (text, done.stderr)
  for block in blocks(page, 'python'):
    compile(block, page.name, 'exec')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_placeholders_are_explained(page):
  """Words in capitals inside of code, but for variables, are in the table or the text above it."""
  text = page.read_text()
  prose = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
  explained = set(re.findall(r'[A-Z]{3,}', ' '.join(re.findall(r'`([^`]*)`', prose))))
  known = {'MOE', 'JAX', 'CACHE', 'PLATFORMS', 'TERM', 'BASIC', 'HDD'}
  for block in blocks(page, 'bash'):
    used = set(re.findall(r'\b[A-Z]{3,}\b', block.replace('_', ' ')))
    assert used <= explained | known, used - explained - known


@pytest.mark.parametrize('page, command', COMMANDS)
def test_commands_parse(page, command, monkeypatch):
  monkeypatch.chdir(ROOT)
  cfg = parsed(command[0], command[1:])
  if cfg is not None and 'smoke' not in ' '.join(command):
    sizes = mesh_config.resolve(cfg.mesh, DEVICES[page.stem])
    partitioning.check(cfg, types.SimpleNamespace(shape=sizes))  # everything can be split that way


def test_files_that_the_pages_name_exist():
  for page in PAGES:
    for path in re.findall(r'docs/launch/[\w.]+', page.read_text()):
      assert (ROOT / path).exists(), path
  extras = re.findall(r"'\.\[(\w+)\]'", (ROOT / 'docs/launch/Dockerfile').read_text())
  assert extras == ['tpu'] and "'tpu': [" in (ROOT / 'setup.py').read_text()


@pytest.fixture
def cluster(tmp_path):
  """A directory with stand-ins for srun and scontrol that say what they were called with."""
  for name in ('srun', 'scontrol'):
    path = tmp_path / 'bin' / name
    path.parent.mkdir(exist_ok=True)
    line = 'echo "$TRAINED"; exit $STATUS' if name == 'srun' else ''
    words = f'printf "%s\\n" {name} "$@" MOE_JAX_CACHE="$MOE_JAX_CACHE"'
    path.write_text(f'#!/bin/bash\n{words}\n{line}\n')
    path.chmod(0o755)
  return tmp_path


def submit(
  cluster: pathlib.Path, *arguments: str, trained: str = 'goodput: 9%', status: int = 0
) -> list[str]:
  """What the script says where training ends with the line `trained` and a status."""
  path = f'{cluster / "bin"}:{os.environ["PATH"]}'
  env = {'PATH': path, 'SLURM_SUBMIT_DIR': str(cluster), 'SLURM_JOB_ID': '70001'}
  env |= {'TMPDIR': str(cluster), 'TRAINED': trained, 'STATUS': str(status)}
  done = subprocess.run(['bash', str(SCRIPT), *arguments], env=env, capture_output=True, text=True)
  assert done.returncode == status, done.stderr
  assert [path.name for path in cluster.iterdir() if path.is_file()] == []
  return done.stdout.splitlines()


def test_the_batch_script_starts_the_command_and_leaves_what_is_finished(cluster, monkeypatch):
  arguments = ['--config=configs/smoke.py', '--workdir=runs/smoke', '--config.train.num_steps=200']
  said = submit(cluster, *arguments)
  begin = said.index('.venv/bin/python')
  assert said[:begin] == ['srun', '--kill-on-bad-exit=1']
  assert said[begin + 1 : begin + 6] == ['-m', 'experiments.train', *arguments]
  assert f'MOE_JAX_CACHE={cluster}/.cache' in said
  assert 'scontrol' not in said
  monkeypatch.chdir(ROOT)
  assert parsed('experiments.train', arguments).train.num_steps == 200
  assert 'scontrol' not in submit(cluster, *arguments, trained='error: no', status=2)


@pytest.mark.parametrize('workdir', [['--workdir=gs://b/run'], ['--workdir', 'runs/smoke']])
@pytest.mark.parametrize('processes', [1, 2])
def test_what_was_stopped_is_queued_again_whatever_its_workdir_holds(cluster, workdir, processes):
  (cluster / 'runs' / 'smoke').mkdir(parents=True)
  (cluster / 'runs' / 'smoke' / 'evaluation.json').touch()  # of a run that is prolonged now
  line = train_command.stopped('SIGTERM', 7, 'python -m experiments.train ...', processes)
  said = submit(cluster, '--config=smoke', *workdir, trained=line, status=143)
  assert said[-4:-1] == ['scontrol', 'requeue', '70001']


def test_the_tasks_of_the_batch_script_find_each_other():
  options = dict(re.findall(r'^#SBATCH --([\w-]+)=(\S+)', SCRIPT.read_text(), re.MULTILINE))
  assert options['signal'] == 'TERM@120'
  nodes, per_node = 2, int(options['ntasks-per-node'])
  for task in range(nodes * per_node):
    environ = {
      'SLURM_JOB_ID': '70001',
      'SLURM_NTASKS': str(nodes * per_node),
      'SLURM_STEP_NUM_TASKS': str(nodes * per_node),
      'SLURM_STEP_NUM_NODES': str(nodes),
      'SLURM_STEP_NODELIST': 'gpu[007-008]',
      'SLURM_PROCID': str(task),
      'SLURM_LOCALID': str(task % per_node),
      'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7',
    }
    place = launch.resolve(launch.Flags(), environ)
    port = 61440 + 70001 % 4096
    assert place == launch.Place('slurm', f'gpu007:{port}', 2, task)


@pytest.mark.slow
def test_the_colab_page_runs(tmp_path):
  """Its Python cells after a few steps of its train command; off Colab it writes to ./runs."""
  train = next(c for c in commands('\n'.join(blocks(ROOT / 'docs/launch/colab.md', 'bash'))))
  small = ['--config=configs/smoke.py', '--config.train.num_steps=12']
  flags_given = small + [a for a in train[1:] if not a.startswith('--config=')]
  env = os.environ | {'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg', 'JAX_PLATFORMS': 'cpu'}
  env['MOE_JAX_CACHE'] = str(tmp_path / 'cache')
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  cells = '\n'.join(blocks(ROOT / 'docs/launch/colab.md', 'python'))
  for command in ([sys.executable, '-m', train[0], *flags_given], [sys.executable, '-c', cells]):
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('12 1 device(s)')
