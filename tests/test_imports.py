"""The house rules that can be read off the source: who imports whom, names, docstrings, sizes."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 120


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

# Names, not modules: the tables that a layer looks its functions up in, and what routers return.
ALLOWED_NAMES = {
  'moe_jax.models.dispatch.DISPATCHES',
  'moe_jax.models.routers.ROUTERS',
}


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


def below(prefix: str) -> set[str]:
  """A module and, for a package, everything in it."""
  return {name for name in ALL if name == prefix or name.startswith(prefix + '.')}


CONFIG_NEEDS = {
  'moe_jax.config_attention',
  'moe_jax.config_mesh',
  'moe_jax.config_moe',
  'moe_jax.errors',
}


def union(*prefixes: str) -> set[str]:
  return set().union(*(below(f'moe_jax.{prefix}') for prefix in prefixes))


def test_the_walk_sees_the_imports():
  assert 'moe_jax.models.transformer' in needs('moe_jax.train')
  assert needs('moe_jax.config') == CONFIG_NEEDS
  assert 'configs.base' in needs('configs.quickstart')


def test_no_cycles():
  done, path = set(), []

  def visit(name):
    assert name not in path, ' -> '.join([*path[path.index(name) :], name])
    if name not in done:
      path.append(name)
      for target in sorted(needs(name)):
        visit(target)
      path.pop()
      done.add(name)

  for name in ALL:
    visit(name)


@pytest.mark.parametrize('name', LIBRARY)
def test_library_imports_the_library_only(name):
  outside = {target for target in needs(name) if not target.startswith('moe_jax')}
  assert not outside


def test_config_imports_only_errors():
  assert needs('moe_jax.config') == CONFIG_NEEDS
  for name in ('config_moe', 'config_attention', 'config_mesh'):
    assert needs(f'moe_jax.{name}') == {'moe_jax.errors'}
  assert not needs('moe_jax.errors')


# Who -> what it may not import. `models` are below the loop, and the leaves below the models.
LEAVES = (
  *('losses', 'balance', 'optim', 'metrics', 'router_metrics', 'similarity', 'partitioning'),
  *(
    'flops',
    'checkpoint',
    'checkpoint_stream',
    'data',
    'bits',
    'config_moe',
    'config_attention',
    'config_mesh',
    'plots',
  ),
  *('distributed', 'lifeline', 'processes', 'roll_call'),
)
LOOPS = ('train', 'evaluate', 'generate')
TOP = ('run', 'run_load', 'seeds', 'report', 'analysis', 'interop', 'warm_start')
FORBIDDEN = [
  (LEAVES, ('models', *LOOPS, *TOP)),
  (('models',), (*LOOPS, *TOP, 'data', 'checkpoint', 'metrics', 'losses', 'optim', 'run_record')),
  (('models.layers', 'models.rope', 'models.attend'), ('models.routers', 'models.dispatch')),
  (
    ('models.routers', 'models.dispatch'),
    ('models.attention', 'models.mla', 'models.moe', 'models.transformer'),
  ),
  (('models.attention', 'models.mla', 'models.moe'), ('models.transformer', 'models.decode')),
  (('models.attend',), ('models.attention', 'models.mla', 'models.routers', 'models.dispatch')),
  (('models.routers',), ('models.dispatch',)),
  (('models.dispatch',), ('models.routers',)),
  (('train', 'generate'), ('data', 'checkpoint', *TOP)),
  (('evaluate',), ('checkpoint', 'train', *TOP)),
]


@pytest.mark.parametrize('who, what', FORBIDDEN)
def test_direction(who, what):
  for prefix in (*who, *what):
    assert below(f'moe_jax.{prefix}'), f'moe_jax.{prefix} is gone: correct this table'
  for name in sorted(union(*who)):
    wrong = needs(name) & union(*what)
    assert not wrong, f'{name} must not import {sorted(wrong)}'


@pytest.mark.parametrize('name', CONFIGS)
def test_config_pages_hold_values_only(name):
  for target in imported(name):
    top = target.split('.')[0]
    allowed = top in sys.stdlib_module_names or target in ('ml_collections', 'configs.base')
    assert allowed, f'{name} imports {target}'


@pytest.mark.parametrize('name', [*LIBRARY, *EXPERIMENTS])
def test_modules_are_imported_not_names(name):
  for target in imported(name):
    if target.split('.')[0] in ('moe_jax', 'configs', 'experiments'):
      assert target in ALL or target in ALLOWED_NAMES, f'{name} imports the name {target}'


@pytest.mark.parametrize('name', LIBRARY)
def test_module_has_a_docstring(name):
  tree = TREES[name]
  assert ast.get_docstring(tree) or not tree.body, name  # an empty __init__ needs none


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
