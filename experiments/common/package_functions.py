"""Functions of the standard library, to be told apart by their packages, as text."""

import ast
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moe_jax import errors

# Packages of pure Python with many functions; some pairs share a subject, so that classes meet.
PACKAGES = (
  'asyncio',
  'email',
  'unittest',
  'xml',
  'multiprocessing',
  'importlib',
  'logging',
  'urllib',
)
_LEAST, _MOST = 120, 420  # characters of a function


class Document(NamedTuple):
  """A function and where it is from."""

  text: str
  package: int  # number of its package
  place: float  # in [0, 1), by a hash of the text: what is held out does not depend on a seed


def read(packages: Sequence[str] = PACKAGES, per_package: int = 100) -> list[Document]:
  """Returns functions of each package, those with the smallest hashes, each text once.

  Raises:
    errors.InputError: a package is not there, or has fewer functions of that length.
  """
  found = []
  for number, package in enumerate(packages):
    texts = sorted(set(_functions(package)), key=_place)
    errors.require(
      len(texts) >= per_package,
      f'package {package} has {len(texts)} functions of {_LEAST} to {_MOST} characters, fewer than '
      f'--per_package={per_package}; take fewer, or leave the package out',
    )
    found += [Document(text, number, _place(text)) for text in texts[:per_package]]
  return found


def _place(text: str) -> float:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], 'big') / 2**56


def _functions(package: str) -> Iterator[str]:
  """Source of every function of a package, without what names the package."""
  known = importlib.util.find_spec(package)
  places = list(known.submodule_search_locations or ()) if known else []
  errors.require(bool(places), f'no package {package!r} is installed here; leave it out')
  for path in sorted(pathlib.Path(places[0]).rglob('*.py')):
    if 'test' in path.relative_to(places[0]).parts:
      continue
    try:
      source = path.read_text(encoding='utf-8')
      tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates that are not Python
      continue
    lines = source.split('\n')
    for node in ast.walk(tree):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        text = _segment(lines, node)
        if _LEAST <= len(text) <= _MOST and package not in text.lower():
          yield text


def _segment(lines: Sequence[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
  """`ast.get_source_segment` of a file's lines, without splitting the file for every node."""
  own = [line.encode() for line in lines[node.lineno - 1 : node.end_lineno]]
  own[-1] = own[-1][: node.end_col_offset]
  own[0] = own[0][node.col_offset :]
  return b'\n'.join(own).decode()


def question(document: Document) -> str:
  """What a model is asked about a document."""
  return f'Which package is this from?\n{document.text}'
