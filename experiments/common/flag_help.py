"""What `--help` shows of a command: its docstring, and its own flags with type and default."""

import dataclasses
import pathlib
import re
import signal
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

_ROOT = pathlib.Path(__file__).parents[2]
WIDTH = 100
HELP_ARGUMENTS = ('--help', '-help', '-h', '-?', '--helpshort', '--helpfull')
INTERNAL = 'internal: '  # begins the help of flags that commands give to their own processes
_FOR = re.compile(r'(?:^|; )(\w[\w, ]*): ')  # the readers in 'key: its file; encode: ...'
_TYPES = {
  'int': 'INTEGER',
  'float': 'NUMBER',
  'string': 'TEXT',
  'path': 'PATH',
  'multi string': 'TEXT',
}
_TYPES |= {'multi int': 'INTEGER', 'comma separated list of strings': 'A,B,...'}


@dataclasses.dataclass(frozen=True)
class Flag:
  """One flag of a command, in words."""

  name: str
  type: str  # 'TEXT', 'PATH', 'INTEGER', 'NUMBER', 'A,B,...', 'a|b|c' (a choice) or '' (a switch)
  default: str  # as one would type it; '' where there is none
  help: str
  repeated: bool = False  # may be given several times

  @property
  def usage(self) -> str:
    """The flag as it is typed: `--step=INTEGER`, `--[no]json`."""
    return f'--{self.name}={self.type}' if self.type else f'--[no]{self.name}'


def described(define_flags: Callable[[], object], values: Any = flags.FLAGS) -> list[Flag]:
  """Calls `define_flags`, which adds flags to `values`, and returns those that it has added."""
  before = set(values)
  define_flags()
  added = [values[name] for name in values if name not in before]
  return [_described(flag) for flag in added if not flag.help.startswith(INTERNAL)]


def own_names(values: Any = flags.FLAGS) -> list[str]:
  """Returns the names of all flags but those that absl defines for itself."""
  found = values.flags_by_module_dict()
  return [flag.name for m, own in found.items() if not m.startswith('absl') for flag in own]


def actions(words: str, known: Sequence[str]) -> list[str]:
  """The actions that read a flag, by its help 'encode, decode: ...; key: ...'; none says all."""
  named = [word for group in _FOR.findall(words) for word in group.split(', ')]
  return [one for one in known if any(word.split()[0] == one for word in named)]


def _described(flag: flags.Flag) -> Flag:
  kind = flag.flag_type()
  if isinstance(flag.parser, flags.EnumParser):
    kind = '|'.join(flag.parser.enum_values)
  else:
    kind = '' if flag.boolean else _TYPES.get(kind, kind)
  repeated = isinstance(flag, flags.MultiFlag) or getattr(flag, 'repeated', False)
  return Flag(flag.name, kind, _default(flag.default), flag.help, repeated)


def _default(value: object) -> str:
  if value is None or value in ('', []):
    return ''
  if isinstance(value, bool):
    return str(value).lower()
  words = ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
  return words.replace(f'{_ROOT}/', '')  # a folder of ours is shown as it is named in a clone


def text(doc: str, own: Sequence[Flag]) -> str:
  """Returns the help of a command: its docstring and a paragraph per flag."""
  lines = [doc.strip(), '', 'Flags:']
  for flag in own:
    default = f'default: {flag.default}' if flag.default else ''
    notes = [note for note in (default, 'may be repeated' if flag.repeated else '') if note]
    lines.append(f'  {flag.usage}' + (f'  ({"; ".join(notes)})' if notes else ''))
    indent = 6 * ' '
    lines += textwrap.wrap(flag.help, WIDTH, initial_indent=indent, subsequent_indent=indent)
  return '\n'.join(lines)


def show(page: str):
  """Prints a page; a reader that has seen enough (`| head`) ends the process in silence."""
  before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  try:
    print(page, flush=True)
  finally:
    signal.signal(signal.SIGPIPE, before)  # of whoever called, who may not want to end so
