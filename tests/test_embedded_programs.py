"""Programs that stand in the tests as text: what they import exists, and no name is left unbound.

Some of them need a compiler that is not installed everywhere; this test needs none.
"""

import ast
import builtins
import importlib
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent


def programs():
  """(file and line, parsed text) of every module-level string that is a program with imports."""
  for path in sorted(TESTS.rglob('*.py')):
    for node in ast.parse(path.read_text()).body:
      text = node.value if isinstance(node, ast.Assign) else None
      if isinstance(text, ast.Constant) and isinstance(text.value, str) and 'import' in text.value:
        try:
          yield f'{path.relative_to(TESTS)}:{node.lineno}', ast.parse(text.value)
        except SyntaxError:  # text of another kind
          continue


PROGRAMS = dict(programs())


def bound(tree: ast.AST) -> set[str]:
  """Every name that the program binds somewhere."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      found |= {(name.asname or name.name).partition('.')[0] for name in node.names}
    elif isinstance(node, ast.arg):
      found.add(node.arg)
    elif (
      isinstance(node, (ast.FunctionDef, ast.ClassDef))
      or isinstance(node, ast.ExceptHandler)
      and node.name
    ):
      found.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      found.add(node.id)
  return found


def test_there_are_programs():
  assert len(PROGRAMS) >= 6


@pytest.mark.parametrize('place', PROGRAMS)
def test_names_are_bound(place):
  tree = PROGRAMS[place]
  loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
  assert loaded - bound(tree) - set(dir(builtins)) == set()


@pytest.mark.parametrize('place', PROGRAMS)
def test_imports_exist(place):
  for node in ast.walk(PROGRAMS[place]):
    if isinstance(node, ast.Import):
      for name in node.names:
        importlib.import_module(name.name)
    elif isinstance(node, ast.ImportFrom):
      module = importlib.import_module(node.module)
      for name in node.names:
        if not hasattr(module, name.name):
          importlib.import_module(f'{node.module}.{name.name}')
