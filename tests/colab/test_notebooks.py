"""The notebooks: whole, short, executed in order, and (slow) run from top to bottom."""

import ast
import importlib
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / 'colab').glob('*.ipynb'))
OURS = ('moe_jax', 'configs', 'experiments')
MAX_CELL_LINES, MAX_BYTES = 22, 700_000


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


def test_there_are_four():
  assert [page.name[0] for page in PAGES] == ['1', '2', '3', '4']


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_it_starts_with_its_badge_and_the_install_cell(page):
  cells = load(page)['cells']
  address = re.search(
    r'colab\.research\.google\.com/github/(\S+?)/blob/main/(\S+?)\)', source(cells[0])
  )
  assert address[2] == f'colab/{page.name}'
  repository = re.search(r"REPOSITORY = 'https://github\.com/(.+)'", source(cells[1]))
  assert repository[1] == address[1]
  assert source(cells[1]) == source(load(PAGES[0])['cells'][1])  # one install cell for all


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
  resources = {'metadata': {'path': str(tmp_path)}}
  nbclient.NotebookClient(book, timeout=900, kernel_name='python3', resources=resources).execute()
  for cell in book.cells:
    if cell.cell_type == 'code' and 'plt.show()' in cell.source:
      assert any('image/png' in output.get('data', {}) for output in cell.outputs)
