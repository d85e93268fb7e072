"""Mutants of a module: single small edits of its source, each of which a test ought to notice.

What a reader of the program never computes with is left alone: docstrings, annotations, messages.
"""

import ast
import collections
import dataclasses
import hashlib
import zlib
from collections.abc import Container

COMPARE = {
  ast.Lt: '<=',
  ast.LtE: '<',
  ast.Gt: '>=',
  ast.GtE: '>',
  ast.Eq: '!=',
  ast.NotEq: '==',
  ast.Is: 'is not',
  ast.IsNot: 'is',
  ast.In: 'not in',
  ast.NotIn: 'in',
}
ARITHMETIC = {
  ast.Add: '-',
  ast.Sub: '+',
  ast.Mult: '/',
  ast.Div: '*',
  ast.FloorDiv: '*',
  ast.Mod: '*',
  ast.Pow: '*',
  ast.BitAnd: '|',
}
NAMES = {'min': 'max', 'max': 'min', 'minimum': 'maximum', 'maximum': 'minimum'}
NAMES |= {'any': 'all', 'all': 'any', 'argmax': 'argmin', 'floor': 'ceil', 'ceil': 'floor'}
UNWRAPPED = ('stop_gradient', 'psum', 'pmean')
# Swapped arguments of these are no bug (min, max), or no program.
FIXED_ORDER = (*NAMES, 'isinstance', 'issubclass', 'getattr', 'hasattr', 'zip', 'range', 'field')
MESSAGES = ('InputError', 'print', 'say', 'warn', 'warning', 'info', 'debug', 'error', 'exception')


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One edit. Its key has no line number: it survives edits elsewhere in the module."""

  path: str
  line: int
  kind: str
  start: int  # characters of the source that are replaced
  end: int
  before: str
  after: str
  source: str  # the line of `start`, stripped
  key: str  # 'path :: kind@column :: source', and '#2' for the second of that name

  def apply(self, source: str) -> str:
    return source[: self.start] + self.after + source[self.end :]


def of(source: str, path: str, wanted: Container[str] | None = None) -> list[Mutant]:
  """Every mutant of a module's source that still parses, in the order of the text.

  With `wanted` those of these keys alone, which is quicker.
  """
  finder = _Finder(source)
  finder.visit(ast.parse(source))
  found, seen = [], collections.Counter()
  for kind, start, end, after in sorted(finder.found, key=lambda f: (f[1], f[0])):
    text = source[source.rfind('\n', 0, start) + 1 :].partition('\n')[0]
    column = start - source.rfind('\n', 0, start) - 1 - (len(text) - len(text.lstrip()))
    before = source[start:end]
    long = f'~{zlib.crc32(before.encode()):08x}' if '\n' in before else ''
    key = f'{path} :: {kind}@{column}{long} :: {text.strip()}'
    seen[key] += 1
    key += f' #{seen[key]}' if seen[key] > 1 else ''
    if wanted is not None and key not in wanted:
      continue
    line = source.count('\n', 0, start) + 1
    mutant = Mutant(path, line, kind, start, end, before, after, text.strip(), key)
    try:
      ast.parse(mutant.apply(source))
    except SyntaxError:
      continue  # an edit across brackets or lines that Python does not read
    found.append(mutant)
  return found


def users(source: str, line: int) -> set[str]:
  """Names of the functions and classes around a line, and of those of the module that use them."""
  tree = ast.parse(source)
  kinds = (ast.FunctionDef, ast.ClassDef)
  named = [node for node in ast.walk(tree) if isinstance(node, kinds)]
  inside = {n.name for n in named if n.lineno <= line <= (n.end_lineno or line)}
  inside |= {
    target.id
    for node in tree.body
    if isinstance(node, ast.Assign) and node.lineno <= line <= (node.end_lineno or line)
    for target in node.targets
    if isinstance(target, ast.Name)
  }
  mentioned = {n.name: {_name(inner) for inner in ast.walk(n)} for n in named}
  while True:
    more = {name for name, uses in mentioned.items() if uses & inside} - inside
    if not more:
      return inside
    inside |= more


def _name(func: ast.AST) -> str:
  return getattr(func, 'attr', getattr(func, 'id', ''))


def _is_text(node: ast.AST) -> bool:
  if isinstance(node, ast.JoinedStr):
    return True
  if isinstance(node, ast.BinOp):
    return _is_text(node.left) or _is_text(node.right)
  return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


class _Finder(ast.NodeVisitor):
  """Collects (kind, start, end, replacement)."""

  def __init__(self, source: str):
    self.source = source
    self.found: list[tuple[str, int, int, str]] = []
    lines = source.splitlines(keepends=True)
    self.lines = [line.encode() for line in lines]  # columns of ast count bytes
    self.starts = [0]
    for line in lines:
      self.starts.append(self.starts[-1] + len(line))

  def place(self, line: int, column: int) -> int:
    return self.starts[line - 1] + len(self.lines[line - 1][:column].decode())

  def span(self, node) -> tuple[int, int]:
    return self.place(node.lineno, node.col_offset), self.place(
      node.end_lineno, node.end_col_offset
    )

  def text(self, node) -> str:
    start, end = self.span(node)
    return self.source[start:end]

  def add(self, node, kind: str, after: str, start: int | None = None, end: int | None = None):
    whole = self.span(node)
    start, end = (whole[0] if start is None else start), (whole[1] if end is None else end)
    self.found.append((kind, start, end, after))

  def between(self, left, right) -> tuple[int, int]:
    """The operator between two operands, without brackets that close or open around it."""
    start, end = self.span(left)[1], self.span(right)[0]
    while self.source[start] in ' )\n':
      start += 1
    while self.source[end - 1] in ' (\n':
      end -= 1
    return start, end

  # What is left alone.

  def visit_arg(self, node):
    """Arguments hold nothing but annotations."""

  def visit_Raise(self, node):
    """Messages."""

  def visit_JoinedStr(self, node):
    """Messages."""

  def visit_Import(self, node):
    """Names."""

  visit_ImportFrom = visit_Import  # noqa: N815

  def visit_AnnAssign(self, node):
    if node.value is not None:
      self.visit(node.value)

  def visit_FunctionDef(self, node):
    for inner in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
      self.visit(inner)

  # What is changed.

  def visit_Compare(self, node):
    operands = [node.left, *node.comparators]
    for i, op in enumerate(node.ops):
      self.add(node, f'compare{i}', COMPARE[type(op)], *self.between(*operands[i : i + 2]))
    self.generic_visit(node)

  def visit_BinOp(self, node):
    if type(node.op) in ARITHMETIC and not _is_text(node):
      after = ARITHMETIC[type(node.op)]
      self.add(node, f'arithmetic{after}', after, *self.between(node.left, node.right))
    self.generic_visit(node)

  def visit_AugAssign(self, node):
    if type(node.op) in ARITHMETIC and not _is_text(node.value):
      after = ARITHMETIC[type(node.op)] + '='
      self.add(node, 'arithmetic', after, *self.between(node.target, node.value))
    self.generic_visit(node)

  def visit_BoolOp(self, node):
    after = 'or' if isinstance(node.op, ast.And) else 'and'
    self.add(node, 'logic', after, *self.between(*node.values[:2]))
    self.generic_visit(node)

  def visit_UnaryOp(self, node):
    if isinstance(node.op, ast.Not | ast.USub):
      self.add(node, 'negation', f'({self.text(node.operand)})')
    self.generic_visit(node)

  def visit_Constant(self, node):
    if isinstance(node.value, bool):
      self.add(node, 'flip', str(not node.value))
    elif isinstance(node.value, int):
      self.add(node, 'constant', str(node.value + 1))
    elif isinstance(node.value, float):
      self.add(node, 'constant', repr(node.value * 2 if node.value else 1.0))

  def visit_Call(self, node):
    name = _name(node.func)
    if name in MESSAGES:
      return
    if name in UNWRAPPED and node.args:
      self.add(node, 'unwrap', f'({self.text(node.args[0])})')
    if name in NAMES:
      start, end = self.span(node.func)
      self.add(node, 'name', NAMES[name], end - len(name), end)
    plain = not any(isinstance(a, ast.Starred) for a in node.args[:2])
    if len(node.args) >= 2 and plain and name not in FIXED_ORDER:
      first, second = node.args[:2]
      start, end = self.span(first)[0], self.span(second)[1]
      middle = self.source[self.span(first)[1] : self.span(second)[0]]
      self.add(node, 'swap', self.text(second) + middle + self.text(first), start, end)
    self.generic_visit(node)

  def visit_Expr(self, node):
    if isinstance(node.value, ast.Call) and _name(node.value.func) not in MESSAGES:
      self.add(node, 'removed', 'pass')
    self.generic_visit(node)


def sample(found: list[Mutant], count: int, seed: int) -> list[Mutant]:
  """`count` of them, drawn without replacement by a digest of their keys.

  A larger count begins with the smaller one's, and so does the draw from an edited source, but for
  the mutants that the edit took away or brought.
  """
  digests = {m.key: hashlib.sha256(f'{seed} {m.key}'.encode()).digest() for m in found}
  return sorted(found, key=lambda m: digests[m.key])[:count]
