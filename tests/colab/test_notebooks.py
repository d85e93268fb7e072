"""The notebooks: whole, short, executed in order, and (slow) run from top to bottom."""

import ast
import importlib
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_processes')
PAGES = sorted((ROOT / 'colab').glob('*.ipynb'))
OURS = ('moe_jax', 'configs', 'experiments')
MAX_CELL_LINES, MAX_BYTES = 22, 700_000
# What is said in notebooks that take minutes, and what is run of it here: fewer steps on less text,
# since most of the time of a short run goes to its held-out figures.
TEXT = str(ROOT / 'moe_jax')
SIZES = {
  '1_first_moe': {
    'page.train.num_steps = 150': f'page.train.num_steps = 30; page.data.path = {TEXT!r}',
    'routing_every = 25': 'routing_every = 5',
    'log_every = 25': 'log_every = 5',
    'save_every = 50': 'save_every = 10',
    'for step in (50, 100)': 'for step in (10, 20)',
  },
  '2_gshard_against_fine_grained': {'steps=100': f'steps=12, data_path={TEXT!r}'},
  '4_your_own_router': {
    'page.train.num_steps = 100': f'page.train.num_steps = 25; page.data.path = {TEXT!r}'
  },
  '5_reinforcement': {
    'base_steps, reward_steps, questions = 800, 120, 512': (
      'base_steps, reward_steps, questions = 24, 6, 16'
    )
  },
}


def load(page: pathlib.Path) -> dict:
  return json.loads(page.read_text(encoding='utf-8'))


def code_cells(page: pathlib.Path) -> list[dict]:
  return [cell for cell in load(page)['cells'] if cell['cell_type'] == 'code']


def source(cell: dict) -> str:
  return ''.join(cell['source'])


def outputs(page: pathlib.Path) -> str:
  """All text that the cells printed."""
  found = []
  for cell in code_cells(page):
    for output in cell['outputs']:
      found.append(''.join(output.get('text', [])))
      found.append(''.join(output.get('data', {}).get('text/plain', [])))
  return '\n'.join(found)


def test_there_are_five():
  assert [page.name[0] for page in PAGES] == ['1', '2', '3', '4', '5']


def repository() -> str:
  """The address that setup.py names, '' while there is none."""
  return re.search(r"^REPOSITORY = '(.*)'", (ROOT / 'setup.py').read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_it_starts_with_the_install_cell_and_a_badge_only_if_it_leads_somewhere(page):
  cells = load(page)['cells']
  assert source(cells[1]) == source(load(PAGES[0])['cells'][1])  # one install cell for all
  badge = re.search(r'colab\.research\.google\.com/github/(\S+?)/blob/main/(\S+?)\)', source(cells[0]))
  if not repository():
    assert badge is None
    return
  assert f'https://github.com/{badge[1]}' == repository() and badge[2] == f'colab/{page.name}'
  assert repository() in source(cells[1]), 'the install cell must clone the public repository'


def test_no_file_names_another_address_of_the_repository():
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True)
  kinds = ('.md', '.ipynb', '.py', '.toml', '.yml', '.yaml', '.cff')
  for name in listed.stdout.splitlines():
    if name.endswith(kinds) and (ROOT / name).is_file():
      text = (ROOT / name).read_text(encoding='utf-8')
      for address in re.findall(r'https://github\.com/[\w.-]+/moe_jax\b', text):
        assert address == repository(), f'{name}: {address} is not the REPOSITORY of setup.py'


def install(page: pathlib.Path, monkeypatch) -> list[str]:
  """The arguments that the install cell gives to pip where moe_jax is absent."""
  calls = []
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(subprocess, 'run', lambda command, check: calls.append(command))
  monkeypatch.setattr(shutil, 'which', lambda name: None)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.delenv('TPU_NAME', raising=False)
  exec(source(code_cells(page)[0]), {})
  (command,) = calls
  assert command[:5] == [sys.executable, '-m', 'pip', 'install', '-q']
  return command[5:]


def test_the_install_cell_finds_a_clone_or_a_wheel(tmp_path, monkeypatch):
  page = PAGES[0]
  monkeypatch.chdir(tmp_path)
  with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match='beside this'):
    install(page, patch)
  for version in ('0.1.0', '0.2.0'):
    (tmp_path / f'moe_jax-{version}-py3-none-any.whl').write_text('')
  with monkeypatch.context() as patch:
    assert install(page, patch) == [str(tmp_path / 'moe_jax-0.2.0-py3-none-any.whl')]
  (tmp_path / 'moe_jax/moe_jax/api').mkdir(parents=True)
  with monkeypatch.context() as patch:
    assert install(page, patch) == ['-e', str(tmp_path / 'moe_jax')]
  (tmp_path / 'moe_jax/colab').mkdir()
  monkeypatch.chdir(tmp_path / 'moe_jax/colab')
  with monkeypatch.context() as patch:
    assert install(page, patch) == ['-e', str(tmp_path / 'moe_jax')]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_cells_are_short_explained_and_executed_in_order(page):
  assert page.stat().st_size < MAX_BYTES
  cells = load(page)['cells']
  assert all(len(source(cell).splitlines()) <= MAX_CELL_LINES for cell in cells)
  numbers = [cell['execution_count'] for cell in code_cells(page)]
  assert numbers == list(range(1, len(numbers) + 1))
  assert sum(cell['cell_type'] == 'markdown' for cell in cells) >= 4
  pictures = [o for c in code_cells(page) for o in c['outputs'] if 'image/png' in o.get('data', {})]
  assert pictures
  for cell in code_cells(page):
    compile(source(cell), page.name, 'exec')
    assert all(output['output_type'] != 'error' for output in cell['outputs'])


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_outputs_say_nothing_of_the_machine(page):
  assert not re.search(r'/(home|root|tmp|work|usr)/', outputs(page))


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_what_it_imports_from_here_exists(page):
  nodes = [n for cell in code_cells(page) for n in ast.walk(ast.parse(source(cell)))]
  for node in nodes:
    if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] in OURS:
      for alias in node.names:
        try:
          importlib.import_module(f'{node.module}.{alias.name}')
        except ModuleNotFoundError:
          assert hasattr(importlib.import_module(node.module), alias.name), ast.unparse(node)


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_it_runs_from_top_to_bottom(page, tmp_path):
  nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
  book = nbformat.read(page, as_version=4)
  for said, run in SIZES.get(page.stem, {}).items():
    (cell,) = (cell for cell in book.cells if said in cell.source)
    cell.source = cell.source.replace(said, run)
  resources = {'metadata': {'path': str(tmp_path)}}
  nbclient.NotebookClient(book, timeout=900, kernel_name='python3', resources=resources).execute()
  for cell in book.cells:
    if cell.cell_type == 'code' and 'plt.show()' in cell.source:
      assert any('image/png' in output.get('data', {}) for output in cell.outputs)
