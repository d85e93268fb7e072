"""One letter, one meaning: shapes in docstrings and comments, and einsums, use the legend."""

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2] / 'moe_jax'
FILES = sorted(ROOT.rglob('*.py'))
_SHAPE = re.compile(r"\[([A-Za-z0-9_'., +*/()=-]+)\]")
_LETTER = re.compile(r'(?<![A-Za-z0-9_])[A-Z](?:[nrv]|kv)?(?![A-Za-z0-9_])')


def legend() -> set[str]:
  """The letters of the whole library: each is followed by its meaning, in columns."""
  text = ast.get_docstring(ast.parse((ROOT / 'models/__init__.py').read_text()))
  table = text.split('einsums:\n\n')[1].split('\n\n')[0]
  return {
    cell.split()[0] for line in table.splitlines() for cell in re.split(r'  {4,}', ' ' + line)
  }


def prose(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """(line, text) of every docstring and comment."""
  source = path.read_text()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
      yield node.body[0].lineno, ast.get_docstring(node)
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield token.start[0], token.string


def own(path: pathlib.Path) -> set[str]:
  """The letters that a module declares itself: `Axis letters: W width of a dense FFN, m slices.`"""
  doc = ast.get_docstring(ast.parse(path.read_text())) or ''
  found = re.search(r'^Axis letters: (.*?)\.(\s|$)', doc, re.DOTALL | re.MULTILINE)
  return {part.split()[0] for part in found[1].split(',')} if found else set()


def used(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """(line, letter) of shapes in prose, and of einsums."""
  for line, text in prose(path):
    for shape in _SHAPE.findall(text):
      yield from ((line, letter) for letter in _LETTER.findall(shape))
  for node in ast.walk(ast.parse(path.read_text())):
    is_einsum = isinstance(node, ast.Call) and ast.unparse(node.func).endswith('einsum')
    if is_einsum and isinstance(node.args[0], ast.Constant):  # else a wrapper hands its own on
      yield from ((node.lineno, letter) for letter in re.findall('[A-Z]', node.args[0].value))


def test_the_legend_is_read():
  assert {'B', 'L', 'Nkv', 'Hv', 'K', 'M', 'V'} <= legend()
  assert len(legend()) >= 24


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_letter_is_declared_once(path):
  ours = own(path)
  assert not ours & legend(), 'a letter of the legend has one meaning only'
  unknown = sorted({(line, letter) for line, letter in used(path) if letter not in legend() | ours})
  assert not unknown, f'{path}: (line, letter) neither in moe_jax/models/__init__.py nor declared'
