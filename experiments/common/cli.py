"""What the commands share: config pages, and errors in one line.

`run(main)` is `app.run` for people: bad input ends the command with status 2 and a single line
`error: ...` on standard error, never with a traceback. `config_flag` and `resolve` read a config
page (`moe_jax.config.pages`) for commands that also take overrides, `--config.KEY=VALUE`.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from moe_jax import errors
from moe_jax.config import pages, parse, schema
from moe_jax.data import cache
from moe_jax.devices import compile_cache
from moe_jax.processes import launch, watchdog
from moe_jax.runs import run_record

MISSING_CONFIG = (
  '--config is missing; give a config page, for example --config=configs/quickstart.py'
)


def run(main: Callable[[Sequence[str]], object], define_flags: Callable[[], object] | None = None):
  """Parses the flags, runs `main(argv)` and exits.

  Args:
    main: the command; raises errors.InputError for whatever the user can mend.
    define_flags: called first. Flags that are defined here, and not while the command's module is
      imported, let tests import several commands into one process.
  """
  if define_flags is not None:
    define_flags()

  def quiet_main(argv: Sequence[str]):
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # app.run leaves it at INFO, and JAX is talkative
    compile_cache.enable(cache.root(''))
    status = main(argv)
    for line in _LIFELINES:
      line.finish()
    return status

  try:
    app.run(quiet_main, flags_parser=_parse_flags)
  except errors.InputError as error:
    message = ' '.join(str(error).split())
    print('error:', message, file=sys.stderr)
    _exit(2, message)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    _exit(130, 'interrupted')
  except BrokenPipeError:
    # The reader (head, less) has seen enough; without this, closing stdout would fail once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except Exception as error:
    if not _LIFELINES:
      raise
    time.sleep(1)  # if this comes of another process's end, that is said now, and ends us
    traceback.print_exc()
    _exit(1, f'{type(error).__name__}: {error}')


def _exit(status: int, reason: str):
  """Ends the command; of many processes, all of them."""
  for line in _LIFELINES:
    line.fail(reason, status)
  sys.exit(status)


def config_flag() -> flags.FlagHolder:
  """Defines `--config=PAGE[:VARIANT]` with `--config.KEY=VALUE` overrides of its (locked) keys."""
  return config_flags.DEFINE_config_file(
    'config', lock_config=True, help_string='config page, path.py or path.py:variant'
  )


def workdir_flag(help_string: str) -> flags.FlagHolder:
  """Defines `--workdir`."""
  return flags.DEFINE_string('workdir', None, help_string)


def distributed_flags():
  """Defines how several processes find each other; see `moe_jax.processes.launch`."""
  default = launch.Flags()
  flags.DEFINE_enum(
    'distributed', default.kind, launch.KINDS, 'where this process finds its place among many'
  )
  flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, the same for all processes')
  flags.DEFINE_integer('num_processes', None, 'how many processes run this command')
  flags.DEFINE_integer('process_id', None, 'which of them this is, from 0')
  flags.DEFINE_float(
    'start_timeout', default.start_timeout, 'seconds in which all processes must have come'
  )
  flags.DEFINE_integer(
    'heartbeat_timeout', default.heartbeat_timeout, 'seconds after which a silent process is dead'
  )


# The lifeline to the other processes, once `start_processes` has found some.
_LIFELINES: list[watchdog.Lifeline] = []


def start_processes(record: Mapping[str, Any]):
  """Starts JAX among the processes that run this command, if there are several.

  Call it before anything touches a device.

  Args:
    record: what must be equal on all of them, as nested dicts that JSON can hold.

  Raises:
    errors.InputError: contradicting flags; a process is missing, or runs something else.
  """
  names = ('coordinator', 'num_processes', 'process_id', 'start_timeout', 'heartbeat_timeout')
  given = launch.Flags(flags.FLAGS.distributed, **{name: flags.FLAGS[name].value for name in names})
  place = launch.resolve(given)
  if place is not None:
    record = {**record, 'versions': run_record.versions()}
    _LIFELINES.append(launch.initialize(place, given, record))


def required(name: str, *, may_be_empty: bool = False) -> str:
  """The value of a string flag that has no default.

  Raises:
    errors.InputError: it was not given.
  """
  value = flags.FLAGS[name].value
  if value is None or not (value or may_be_empty):
    raise errors.InputError(f'--{name} is missing: {flags.FLAGS[name].help}')
  return value


def resolve(flag_value: ml_collections.ConfigDict | None) -> schema.Config:
  """Checks the value of `config_flag` and returns it as dataclasses.

  Raises:
    errors.InputError: no page was given, or a value in it breaks a rule.
  """
  if flag_value is None:
    raise errors.InputError(MISSING_CONFIG)
  return parse.from_dict(flag_value.to_dict())


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """The flags_parser of `app.run`: all that can be wrong with a command line is an InputError."""
  if 'config' in flags.FLAGS and config_flags.config_flags.is_config_flag(flags.FLAGS['config']):
    # config_flags would answer these mistakes with tracebacks of several exception types.
    _check_config_arguments(argv)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise errors.InputError(str(error)) from error
  if len(rest) > 1:
    raise errors.InputError(f'unexpected argument {rest[1]!r}; all arguments are --name=value')
  return rest


def _check_config_arguments(argv: Sequence[str]):
  """Checks that `--config` names a page and that every `--config.KEY` is one of the page's keys."""
  arguments = dict(_config_arguments(argv))
  spec = arguments.pop('', None)
  if spec is None:
    if arguments:
      raise errors.InputError(MISSING_CONFIG)
    return
  values = pages.values(spec).to_dict()
  for key in arguments:
    _check_key(values, key)


def _config_arguments(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields (key, value) of `--config.key=value`, with key '' for `--config=value` itself."""
  for i, argument in enumerate(argv[1:], start=1):
    if argument == '--':
      return
    match = re.match(r'--?(?:no)?config(?:\.([^=]+))?(?:=(.*))?$', argument, re.DOTALL)
    if match:
      following = argv[i + 1] if i + 1 < len(argv) else ''
      yield match[1] or '', following if match[2] is None else match[2]


def _check_key(values: Mapping[str, object], key: str):
  prefix = 'config'
  for part in key.split('.'):
    name = part.partition('[')[0]  # config_flags also understands key[index]
    if not isinstance(values, Mapping):
      raise errors.InputError(f'{prefix} is a single value, it has no key {name!r}')
    if name not in values:
      hint = errors.did_you_mean(name, values)
      raise errors.InputError(f'{prefix}.{name} is not a known key{hint}')
    values, prefix = values[name], f'{prefix}.{name}'
