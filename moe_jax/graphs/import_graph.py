"""The graph of the imports between modules of installed Python packages; nothing is run.

Nodes are modules, edges their imports, as far as both are in the packages. Classes are the
packages, or of a single package its subpackages. Features are the names that a module's code uses.
"""

import ast
import collections
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax import errors
from moe_jax.graphs import dataset, structs

NUM_FEATURES = 512
_LEAST_MODULES = 3  # that use a name
_MOST_SHARE = 0.5  # of modules that use it


def read(packages: Sequence[str], least: int = 40) -> dataset.Dataset:
  """Returns the graph of the packages' modules in classes of at least `least` modules.

  Raises:
    errors.InputError: a package is not installed; fewer than two classes are large enough.
  """
  trees = {}
  for package in packages:
    trees |= {
      name: (tree, is_package) for name, tree, is_package in _modules(_directory(package), package)
    }
  depth = 1 if len(packages) == 1 else 0
  groups = {name: group for name in trees if (group := _group(name, depth))}
  sizes = collections.Counter(groups.values())
  classes = sorted(group for group, size in sizes.items() if size >= least)
  errors.require(
    len(classes) >= 2,
    f'--graph=imports:{"+".join(packages)} has {len(classes)} classes of at least {least} modules; '
    'name another package, or several joined by +',
  )
  names = [name for name in sorted(groups) if groups[name] in classes]
  places = {name: i for i, name in enumerate(names)}
  pairs = [
    (places[name], places[target])
    for name in names
    for target in set(_imports(name, *trees[name]))
    if target in places
  ]
  return dataset.Dataset(
    f'imports:{"+".join(packages)}',
    structs.undirected(np.array(pairs), len(names)),
    _features([trees[name][0] for name in names]),
    np.array([classes.index(groups[name]) for name in names], np.int32),
    tuple(classes),
  )


def _directory(package: str) -> pathlib.Path:
  """Where a package lies, without importing it."""
  known = package.isidentifier() and importlib.util.find_spec(package)
  places = list(known.submodule_search_locations or ()) if known else []
  if not places:
    raise errors.InputError(f'--graph=imports:{package}: no package {package!r} is installed here')
  return pathlib.Path(places[0])


def _modules(directory: pathlib.Path, package: str) -> Iterator[tuple[str, ast.AST, bool]]:
  """(dotted name, source tree, whether it is a package) of a package's modules, tests left out.

  Files that are not Python of this version are left out.
  """
  for path in sorted(directory.rglob('*.py')):
    parts = (package, *path.relative_to(directory).with_suffix('').parts)
    if any(part.startswith(('test', '_test')) or not part.isidentifier() for part in parts):
      continue
    is_package = parts[-1] == '__init__'
    try:
      tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
      continue
    yield '.'.join(parts[:-1] if is_package else parts), tree, is_package


def _group(name: str, depth: int) -> str:
  """The class of a module: its package, or subpackage; '' for what stands above these."""
  parts = name.split('.')
  return '.'.join(parts[: depth + 1]) if len(parts) > depth else ''


def _imports(name: str, tree: ast.AST, is_package: bool) -> Iterator[str]:
  """Every dotted name that a module may import; of `from a import b` both a and a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      parts = name.split('.')
      # One dot is the module's own package, each more of them the one above.
      base = parts[: len(parts) - node.level + is_package] if node.level else []
      source = '.'.join([*base, *([node.module] if node.module else [])])
      yield source
      yield from (f'{source}.{alias.name}' for alias in node.names)


def _names(tree: ast.AST) -> Iterator[str]:
  """The names in a module's code, without those of its imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      yield node.name
    elif isinstance(node, ast.arg):
      yield node.arg


def _features(trees: Sequence[ast.AST]) -> np.ndarray:
  """[modules, names] log counts of the commonest names that few enough use; rows of length 1."""
  counts = [collections.Counter(_names(tree)) for tree in trees]
  users = collections.Counter(name for count in counts for name in count)
  most = _MOST_SHARE * len(trees)
  kept = [name for name, num in users.items() if _LEAST_MODULES <= num <= most]
  kept = sorted(kept, key=lambda name: (-users[name], name))[:NUM_FEATURES]
  places = {name: i for i, name in enumerate(kept)}
  found = np.zeros((len(trees), len(kept)), np.float32)
  for row, count in zip(found, counts, strict=True):
    for name, number in count.items():
      if name in places:
        row[places[name]] = np.log1p(number)
  return dataset.unit_rows(found)
