"""All commands and studies with their purposes and flags, for `python -m experiments` and docs/."""

import ast
import dataclasses
import importlib
import pathlib

from experiments.common import flag_help

_HERE = pathlib.Path(__file__).parents[1]
# One of these ends the module of every command.
_STARTS = (
  'cli.run(main, define_flags)',
  'cli.run(main, define_flags, words=True)',
  'sys.exit(cli.run(main, define_flags))',
  'cli.run_action(main, define_flags, ACTIONS)',
)


@dataclasses.dataclass(frozen=True)
class Command:
  """`python -m experiments.NAME`."""

  name: str  # 'train', 'bench.gpu'
  purpose: str  # first line of the docstring
  doc: str  # all of it, with the command as one types it

  @property
  def is_study(self) -> bool:
    """Whether it is a folder (a question with its results) and not a command over a run."""
    return (_HERE / self.name.partition('.')[0]).is_dir()

  def flags(self) -> list[flag_help.Flag]:
    """Returns the command's own flags, in the order in which they are defined.

    Defines them for a moment in absl's global table, where no other command may have its own.
    """
    module = importlib.import_module(_module_name(self.name))
    values = flag_help.flags.FLAGS
    before = set(values)
    try:
      return flag_help.described(module.define_flags)
    finally:
      values.remove_flag_values(set(values) - before)


def commands() -> list[Command]:
  """Returns all commands, then all studies, by name; reads their source, imports none of them."""
  found = []
  for path in _HERE.rglob('*.py'):
    source = path.read_text(encoding='utf-8')
    if source.rstrip().endswith(_STARTS):
      doc = ast.get_docstring(ast.parse(source)) or ''
      parts = path.relative_to(_HERE).with_suffix('').parts
      name = '.'.join(part for part in parts if part != '__main__')
      found.append(Command(name, doc.partition('\n')[0], doc))
  return sorted(found, key=lambda command: (command.is_study, command.name))


def text() -> str:
  """Returns a line per command and per study."""
  lines = []
  for title, is_study in (('Commands', False), ('Studies', True)):
    lines.append(f'{title}:')
    for command in commands():
      if command.is_study == is_study:
        lines.append(f'  experiments.{command.name:17} {command.purpose}')
    lines.append('')
  lines.append('python -m experiments.NAME --help shows the flags of one of them.')
  return '\n'.join(lines)


def _module_name(name: str) -> str:
  is_folder = (_HERE / name).is_dir()
  return f'experiments.{name}' + ('.__main__' if is_folder else '')
