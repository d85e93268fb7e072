"""Writes the tables of docs/tables from the code: commands, config pages, config fields, routers.

Run:  python -m docs.generate [--check]

With --check nothing is written, and a table that differs from the code is an error. A test holds
them to the code in the same way.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import io
import pathlib
import re
import sys
import tokenize
import typing
from collections.abc import Iterator, Mapping, Sequence

from configs import base, routing
from experiments.common import command_list
from moe_jax import models
from moe_jax.config import router_traits, schema

ROOT = pathlib.Path(__file__).parents[1]
TABLES = ROOT / 'docs' / 'tables'
NOTE = '<!-- Written by `python -m docs.generate`; do not edit. -->'
ARXIV = 'https://arxiv.org/abs'
WITH_TORCH = ('parity',)  # not imported here: only the extra `hf` has torch


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; bars within cells are escaped."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(c.replace('|', '\\|') for c in row) + ' |' for row in lines)


def page(title: str, *parts: str) -> str:
  """A page of docs/tables."""
  return '\n\n'.join((f'# {title}', NOTE, *parts)) + '\n'


def code(text: object) -> str:
  """The text as code; nothing for an empty text."""
  return f'`{text}`' if str(text) else ''


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of a dataclass of `moe_jax.config`: its type as written, and its comment."""

  type_name: str
  meaning: str


def comments(cls: type) -> dict[str, Field]:
  """Field -> type and comment of a dataclass: on the field's lines, or on those right above it."""
  module = sys.modules[cls.__module__]
  source = inspect.getsource(module)
  notes = {
    token.start[0]: (token.string.removeprefix('#').strip(), token.line.lstrip().startswith('#'))
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  tree = ast.parse(source)
  body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
  found = {}
  for node in body:
    if isinstance(node, ast.AnnAssign):
      above = []
      line = node.lineno - 1
      while line in notes and notes[line][1]:
        above.insert(0, notes[line][0])
        line -= 1
      beside = [notes[i][0] for i in range(node.lineno, node.end_lineno + 1) if i in notes]
      meaning = _choices(' '.join([*above, *beside]), module)
      found[node.target.id] = Field(re.sub(r'\w+\.', '', ast.unparse(node.annotation)), meaning)
  return found


def _choices(text: str, module: object) -> str:
  """A comment with the values in place of the name of a tuple of the module: `one of DTYPES`."""

  def values(match: re.Match) -> str:
    found = getattr(module, match[0], None)
    is_tuple = isinstance(found, tuple) and all(isinstance(one, str) for one in found)
    return ' '.join(code(one) for one in found) if is_tuple else match[0]

  return re.sub(r'\b[A-Z][A-Z_]{3,}\b', values, text)


def config_sections(
  cls: type, values: Mapping[str, object], key: str = ''
) -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
  """Yields (key, docstring, rows) of a config dataclass and of those inside it.

  Args:
    cls: the dataclass.
    values: its defaults.
    key: where it stands in the config.
  """
  hints, notes, rows, inner = typing.get_type_hints(cls), comments(cls), [], []
  prefix = f'{key}.' if key else ''
  for field in dataclasses.fields(cls):
    name, note, kind = field.name, notes[field.name], hints[field.name]
    default = values[name]
    if dataclasses.is_dataclass(kind):
      if kind.__name__ == 'LossConfig':
        shown = ', '.join(f'{k} {v}' for k, v in default.items())
        rows.append((code(prefix + name), 'section', shown, note.meaning))
      else:
        inner.append((kind, default, prefix + name))
      continue
    if isinstance(default, Mapping):
      default = dict(default)
    rows.append((code(prefix + name), code(note.type_name), code(repr(default)), note.meaning))
  yield key, inspect.cleandoc(cls.__doc__ or ''), rows
  for kind, default, name in inner:
    yield from config_sections(kind, default, name)


def config_fields() -> str:
  """The page of all keys with type, default and meaning."""
  parts = [
    'All keys of a run. Types and meanings are read from `moe_jax/config/`, defaults from '
    '`configs/base.py`; a page of `configs/` changes some of them, and `--config.KEY=VALUE` any.'
  ]
  head = ('key', 'type', 'default', 'meaning')
  for key, doc, rows in config_sections(schema.Config, base.get_config().to_dict()):
    parts.append(f'## {code(key) or "The run"}')
    parts += [doc] if key else []
    parts += [table(head, rows)] if rows else []
    if key == 'model.moe.balance':
      loss = comments(importlib.import_module('moe_jax.config.moe_config').LossConfig)
      parts.append('Each balance loss is a section of two keys:')
      rows = [(code(f'.{n}'), code(f.type_name), f.meaning) for n, f in loss.items()]
      parts.append(table(('key', 'type', 'meaning'), rows))
    if key == 'data':
      member = comments(schema.MixtureComponent)
      parts.append('Each member of `data.mixture` has three keys:')
      rows = [(code(f'.{n}'), code(f.type_name), f.meaning) for n, f in member.items()]
      parts.append(table(('key', 'type', 'meaning'), rows))
  return page('Config fields', *parts)


def config_pages() -> str:
  """The page of the config pages and their variants."""
  rows = []
  for path in sorted((ROOT / 'configs').glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    if path.stem in ('__init__', 'base') or not hasattr(module, 'get_config'):
      continue
    doc = inspect.getdoc(module)
    takes = re.search(r'^Takes: +(.+(?:\n {8,}.+)*)', doc, re.MULTILINE).group(1)
    variants = ' '.join(code(name) for name in getattr(module, 'VARIANTS', {}))
    rows.append((code(path.stem), doc.splitlines()[0], ' '.join(takes.split()), variants))
  return page(
    'Config pages',
    'The page `NAME` is `configs/NAME.py`; a variant follows a colon: '
    '`--config=configs/quickstart.py:gshard`. '
    'The text at the top of each page has more: how to run it, what to expect, and what the paper '
    'does not state.',
    table(('page', 'what', 'takes', 'variants'), rows),
  )


def routers() -> str:
  """The page of the routings of `configs/routing.py`, and of the traits of what selects."""
  rows = []
  for name, (what, paper) in routing.SUMMARY.items():
    moe = routing.get_config(name).model.moe
    selects = code(moe.router) if moe.num_experts else ''
    rows.append((code(name), what, selects, code(moe.dispatch) if selects else '', _arxiv(paper)))
  traits = [
    (code(name), one.what, 'yes' if one.causal else 'no', 'yes' if one.bound else 'no')
    + (' '.join(code(option) for option in one.options), _arxiv(one.paper))
    for name, one in router_traits.LIBRARY.items()
  ]
  return page(
    'Routers',
    'Each of these is a variant of one tiny model, `--config=configs/routing.py:NAME`, with the '
    'same data and the same start; losses and loads of most are in '
    '[the comparison](../../experiments/routing_ablation/tiny/report.md).',
    table(('name', 'what', 'model.moe.router', 'dispatch', 'arXiv'), rows),
    '## What selects',
    'The values of `model.moe.router`, with their traits (`moe_jax/config/router_traits.py`). '
    "Causal: a token's experts do not depend on later tokens, so that text can be generated. "
    'Bounded: an expert takes no more than a known number of tokens.',
    table(('router', 'what', 'causal', 'bounded', 'own options', 'arXiv'), traits),
  )


def _arxiv(paper: str) -> str:
  return f'[{paper}]({ARXIV}/{paper})' if paper.strip('-') else ''


def commands() -> str:
  """The page of all commands and studies with their flags."""
  parts = [
    'Each is `python -m experiments.NAME`; [Commands](../topics/commands.md) says what they do and '
    'what they write, and `--help` after any of them shows its part of this page.'
  ]
  for command in command_list.commands():
    parts += [f'## {command.name}', command.purpose]
    if command.name in WITH_TORCH:
      parts.append('Needs the extra `hf`; `--help` shows its flags where that is installed.')
    else:
      rows = [(code(flag.usage), code(flag.default), flag.help) for flag in command.flags()]
      parts.append(table(('flag', 'default', 'what'), rows))
  return page('Commands and flags', *parts)


def rooms() -> str:
  """The page of the rooms of the library and of the letters of axes."""
  rows = []
  for path in sorted((ROOT / 'moe_jax').glob('*/__init__.py')):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
    room = path.parent.name
    rows.append((f'[`{room}`](../reference/{room}.md)', doc.splitlines()[0]))
  letters = inspect.getdoc(models).partition('Axis letters')[2].partition(':')[2].strip('\n')
  return page(
    'Rooms and letters',
    'What each room of `moe_jax/` holds, from the first line of its docstring; what may import '
    'what is in [Reading the code](../topics/reading_the_code.md).',
    table(('room', 'what'), rows),
    '## Letters of axes',
    'From `moe_jax/models/__init__.py`:',
    f'```text\n{letters}\n```',
  )


MAKERS = {
  'commands': commands,
  'configs': config_pages,
  'config_fields': config_fields,
  'routers': routers,
  'rooms': rooms,
}


def tables() -> dict[pathlib.Path, str]:
  """File -> text of every generated table."""
  return {TABLES / f'{name}.md': make() for name, make in MAKERS.items()}


def main():
  """Writes the tables, or with --check says which of them differ from the code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--check', action='store_true', help='write nothing; differences are errors')
  check = parser.parse_args().check
  stale = [
    path.relative_to(ROOT)
    for path, text in tables().items()
    if not path.exists() or path.read_text(encoding='utf-8') != text
  ]
  if check and stale:
    sys.exit(f'{", ".join(map(str, stale))} differ from the code; run python -m docs.generate')
  if not check:
    for path, text in tables().items():
      path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
  main()
