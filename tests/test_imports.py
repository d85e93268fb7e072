"""The house rules that can be read off the source: who imports whom, names, docstrings, sizes."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 120

# The rooms of the library, floor by floor: a file may import files of its own room and of the
# floors above its own in this table (those that need less). A room that is not here fails.
FLOORS = (
  ('errors', 'integer_hash', 'trees', 'atomic_files'),
  ('config', 'federated', 'graphs'),
  ('storage',),
  ('devices', 'processes', 'data', 'balance', 'checkpoints'),
  ('models', 'rewards'),
  ('training', 'inference'),
  ('planning',),
  ('runs',),
  ('interop', 'analysis', 'post_training', 'watermark'),
  ('api',),
)
# The same inside the largest room.
MODEL_FLOORS = (
  ('layers',),
  ('attention', 'routers', 'experts'),
  ('dispatch', 'exchange'),
  ('routed_experts',),
  ('moe_layer',),
  ('decoder_block',),
  ('pipeline_stages',),
  ('token_prediction',),
  ('transformer',),
  ('model_variables',),
)
# Within a floor, rooms may import these others and no more.
NEIGHBOURS = {
  ('atomic_files', 'errors'),
  ('balance', 'data'),
  ('balance', 'devices'),
  ('checkpoints', 'devices'),
  ('inference', 'training'),
  ('post_training', 'interop'),
}

# Names, not modules: the tables that a layer looks its functions up in.
ALLOWED_NAMES = {
  'moe_jax.models.dispatch.DISPATCHES',
  'moe_jax.models.routers.ROUTERS',
}


def modules(package: str) -> dict[str, pathlib.Path]:
  """Dotted name -> file of every module of a top-level package."""
  found = {}
  for path in sorted((ROOT / package).rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  return found


LIBRARY, CONFIGS, EXPERIMENTS = modules('moe_jax'), modules('configs'), modules('experiments')
ALL = LIBRARY | CONFIGS | EXPERIMENTS
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in ALL.items()}


def imported(name: str) -> list[str]:
  """Everything that a module imports, dotted: `from a import b` is a.b."""
  found = []
  for node in ast.walk(TREES[name]):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{name}, line {node.lineno}: import absolutely'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def needs(name: str) -> set[str]:
  """The modules of this repository that a module imports."""
  return {
    target if target in ALL else target.rpartition('.')[0]
    for target in imported(name)
    if target.split('.')[0] in ('moe_jax', 'configs', 'experiments', 'tests', 'colab')
  }


def floor_of(floors, name: str, depth: int) -> tuple[int, str]:
  """(number of the floor, room) of a module whose room is its name's part `depth`."""
  room = name.split('.')[depth]
  number = next((i for i, rooms in enumerate(floors) if room in rooms), None)
  assert number is not None, f'{name}: room {room!r} has no floor in the table of this test'
  return number, room


def check_direction(floors, name: str, target: str, depth: int):
  here, room = floor_of(floors, name, depth)
  there, other = floor_of(floors, target, depth)
  allowed = there < here or room == other or (room, other) in NEIGHBOURS
  assert allowed, f'{name} must not import {target}: {other} is not below {room}'


def test_the_walk_sees_the_imports():
  assert 'moe_jax.models.transformer' in needs('moe_jax.training.objective')
  assert 'moe_jax.config.schema' in needs('moe_jax.config.rules')
  assert 'configs.base' in needs('configs.quickstart')
  with pytest.raises(AssertionError, match='must not import'):
    check_direction(FLOORS, 'moe_jax.models.layers', 'moe_jax.training.loop', 1)
  with pytest.raises(AssertionError, match='has no floor'):
    check_direction(FLOORS, 'moe_jax.drawer.layers', 'moe_jax.training.loop', 1)


def test_no_cycles():
  done, path = set(), []

  def visit(name):
    assert name not in path, ' -> '.join([*path[path.index(name) :], name])
    if name not in done:
      path.append(name)
      for target in sorted(needs(name) - {'moe_jax'}):
        visit(target)
      path.pop()
      done.add(name)

  for name in ALL:
    if name != 'moe_jax':  # the public face imports what is asked for, when it is
      visit(name)


@pytest.mark.parametrize('name', LIBRARY)
def test_direction(name):
  for target in needs(name):
    assert target.startswith('moe_jax'), f'{name} must not import {target}: it is no library'
    if '.' not in name or target == 'moe_jax':
      continue  # the public face; and `moe_jax.__version__`
    check_direction(FLOORS, name, target, 1)
    both = [one.startswith('moe_jax.models.') for one in (name, target)]
    if all(both):
      check_direction(MODEL_FLOORS, name, target, 2)


def test_the_top_holds_few_files():
  top = [path.name for path in (ROOT / 'moe_jax').iterdir() if path.suffix == '.py']
  assert len(top) <= 5, sorted(top)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_pages_hold_values_only(name):
  ours = ('configs.base', 'configs.recipes', 'configs.sizes')
  for target in imported(name):
    top = target.split('.')[0]
    allowed = top in sys.stdlib_module_names or target in ('ml_collections', *ours)
    assert allowed, f'{name} imports {target}'


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_studies_import_what_is_common_and_not_each_other(name):
  own = '.'.join(name.split('.')[:2])
  for target in needs(name):
    if target.startswith('experiments.'):
      room = '.'.join(target.split('.')[:2])
      assert room in (own, 'experiments.common'), f'{name} must not import {target}'


@pytest.mark.parametrize('name', sorted({*LIBRARY, *EXPERIMENTS} - {'moe_jax'}))
def test_modules_are_imported_not_names(name):
  for target in imported(name):
    if target.split('.')[0] in ('moe_jax', 'configs', 'experiments'):
      assert target in ALL or target in ALLOWED_NAMES, f'{name} imports the name {target}'


@pytest.mark.parametrize('name', LIBRARY)
def test_module_has_a_docstring(name):
  assert ast.get_docstring(TREES[name]), name


@pytest.mark.parametrize('name', ALL)
def test_sizes(name):
  assert len(ALL[name].read_text(encoding='utf-8').splitlines()) <= MAX_FILE_LINES
  for node in ast.walk(TREES[name]):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      length = node.end_lineno - node.lineno + 1
      assert length <= MAX_FUNCTION_LINES, f'{name}.{node.name} has {length} lines'


@pytest.mark.parametrize('name', LIBRARY)
def test_no_work_at_import_time(name):
  """Statements at the top of a module define things; a custom VJP's `defvjp` is a definition."""
  for node in TREES[name].body:
    bare = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    bare &= not (bare and ast.unparse(node.value).split('(')[0].endswith('.defvjp'))
    loop = isinstance(node, (ast.For, ast.While, ast.With, ast.Try))
    assert not (bare or loop), f'{name}, line {node.lineno}'
