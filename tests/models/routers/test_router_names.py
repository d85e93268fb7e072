"""No source file outside of models/routers/ compares a router's name, or looks one up by it."""

import ast
import pathlib

import pytest

from moe_jax.config import router_traits

ROOT = pathlib.Path(__file__).parents[3]
NAMES = frozenset(router_traits.LIBRARY)

LOOKUPS = ('get', 'startswith', 'endswith', 'index', 'count')
# Where names may stand as values: the routers themselves and their registry.
EXEMPT = ('moe_jax/models/routers/', 'moe_jax/config/router_traits.py')


def sources():
  """{path: text} of everything in which routers have no names."""
  paths = [
    p for f in ('moe_jax', 'configs', 'experiments') for p in sorted((ROOT / f).rglob('*.py'))
  ]
  texts = {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8') for p in paths}
  return {name: text for name, text in texts.items() if not name.startswith(EXEMPT)}


def strings(node, constants):
  """The strings in a literal, a tuple or set of them, or a constant of the module."""
  if isinstance(node, ast.Name):
    node = constants.get(node.id, node)
  if isinstance(node, ast.Constant):
    return {node.value} if isinstance(node.value, str) else set()
  if isinstance(node, ast.Dict):
    return set().union(*(strings(key, {}) for key in node.keys if key is not None))
  if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
    return set().union(*(strings(one, {}) for one in node.elts))
  if isinstance(node, ast.Call) and node.args:  # frozenset((...)), dict.fromkeys(...)
    return strings(node.args[0], constants)
  return set()


def is_router(node):
  """Whether an expression is somebody's router: `moe.router`, `self.cfg.moe.router`, `router`."""
  return (isinstance(node, ast.Attribute) and node.attr == 'router') or (
    isinstance(node, ast.Name) and node.id in ('router', 'router_name')
  )


def found_in(source, strict=True):
  """[(line, names)]: comparisons, matches and look-ups that depend on a router's name.

  Without `strict` only those in which something is called a router: the variants of config pages
  and the arms of studies have names of routers too.
  """
  tree = ast.parse(source)
  constants = {
    target.id: node.value
    for node in tree.body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name)
  }
  places = []
  for node in ast.walk(tree):
    operands = []
    if isinstance(node, ast.Compare):
      operands = [node.left, *node.comparators]
    elif isinstance(node, ast.Match):
      values = [p.value for p in ast.walk(node) if isinstance(p, ast.MatchValue)]
      operands = [node.subject, *values]
    elif isinstance(node, ast.Subscript):
      operands = [node.slice, node.value]
    elif isinstance(node, ast.Call) and getattr(node.func, 'attr', '') in LOOKUPS and node.args:
      operands = [node.args[0], node.func.value]
    if not (strict or any(is_router(operand) for operand in operands)):
      continue
    named = set().union(*(strings(operand, constants) for operand in operands)) & NAMES
    if named:
      places.append((node.lineno, named))
  return places


@pytest.mark.parametrize(
  'source',
  [
    "x = moe.router == 'topk'",
    "x = 'hash' != cfg.model.moe.router",
    "x = moe.router in ('hash', 'replay')",
    "LIKE_TOPK = ('topk', 'ds_moe')\nx = moe.router not in LIKE_TOPK",
    "COUNT = {'ds_moe': 1}\nx = COUNT[moe.router]",
    "COUNT = {'ds_moe': 1}\nx = COUNT.get(moe.router, 2)",
    "x = {'expert_choice': True}.get(self.cfg.router)",
    "match moe.router:\n  case 'sinkhorn':\n    pass",
    "router = moe.router\nx = router == 'skewed'",
    "x = moe.router.startswith('balanced')",
  ],
)
def test_the_search_finds_them(source):
  assert found_in(source) and found_in(source, strict=False)


def test_the_search_leaves_other_words_alone():
  assert found_in("kind = moe.router\nx = kind == 'hash'")
  assert not found_in("x = variant == 'hash'", strict=False)
  assert not found_in("config.model.moe.router = 'hash'")
  assert not found_in('x = ROUTERS[moe.router]')


@pytest.mark.parametrize('name, source', sources().items(), ids=sources())
def test_names_are_not_compared(name, source):
  found = found_in(source, strict=name.startswith('moe_jax/'))
  assert not found, f'{name}: ask `router_traits.of(moe)`'
