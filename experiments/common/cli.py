"""What the commands share: config pages, and errors in one line.

`run(main)` is `app.run` for people: bad input ends the command with status 2 and a single line
`error: ...` on standard error, never with a traceback; `--help` shows the command's own flags.
`config_flag` and `resolve` read a config page (`moe_jax.config.pages`) under its overrides,
`--config.KEY=VALUE`.

Nothing here imports JAX before the flags have been checked, and no command does: what is heavy is
imported by the functions that need it, so that help and mistyped flags answer at once.
"""

import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging

from experiments.common import config_overrides, flag_help
from moe_jax import errors
from moe_jax.config import parse, paths, schema
from moe_jax.devices import host_allocator
from moe_jax.processes import launch, watchdog
from moe_jax.storage import urls

MISSING_CONFIG = '--config is missing; give a config page, for example --config=quickstart'


def run(
  main: Callable[[Sequence[str]], object],
  define_flags: Callable[[], object] | None = None,
  words: bool = False,
):
  """Parses the flags, runs `main(argv)` and exits.

  Args:
    main: the command; raises errors.InputError for whatever the user can mend. Its module's
      docstring is what --help begins with.
    define_flags: called first. Flags that are defined here, and not while the command's module is
      imported, let tests import several commands into one process.
    words: whether `main` takes arguments that are no flags, argv[1:]; without, they are refused.
  """
  own = flag_help.described(define_flags or (lambda: None))
  if any(argument in flag_help.HELP_ARGUMENTS for argument in sys.argv[1:]):
    flag_help.show(flag_help.text(_module_of(main)['__doc__'] or '', own))
    return

  try:
    app.run(
      functools.partial(_quietly, main), flags_parser=functools.partial(parse_flags, words=words)
    )
  except errors.InputError as error:
    message = ' '.join(str(error).split())
    print('error:', message, file=sys.stderr)
    _exit(2, message)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    _exit(130, 'interrupted')
  except BrokenPipeError:
    # The reader (head, less) has seen enough: silence, with the status of an end by SIGPIPE.
    _exit(128 + signal.SIGPIPE, 'nobody reads its output')
  except Exception as error:
    if not _WATCHDOGS:
      raise
    time.sleep(1)  # if this comes of another process's end, that is said now, and ends us
    traceback.print_exc()
    _exit(1, f'{type(error).__name__}: {error}')
  finally:
    _drop_unread_output()


def run_action(
  main: Callable[..., object], define_flags: Callable[[], object], actions: Sequence[str]
):
  """`run` of a command whose first argument says what to do: `python -m experiments.X ACTION`.

  Flags whose help begins with other actions ('encode, decode: ...') are refused.

  Args:
    main: called with (argv, action).
    define_flags: as of `run`.
    actions: the words that may stand there.
  """
  argument = sys.argv[1] if len(sys.argv) > 1 else ''
  if argument in flag_help.HELP_ARGUMENTS:
    run(main, define_flags)
    return
  if argument not in actions:
    words = ', '.join(actions)
    hint = errors.did_you_mean(argument, actions)
    print(f'error: {argument!r} must be one of {words}{hint}; see --help', file=sys.stderr)
    sys.exit(2)
  del sys.argv[1]

  @functools.wraps(main)
  def chosen(argv: Sequence[str]) -> object:
    refuse_flags_of_others(argument, actions)
    return main(argv, argument)

  run(chosen, define_flags)


def refuse_flags_of_others(action: str, actions: Sequence[str]):
  """Refuses flags that were given and that only other actions read, by their help.

  Raises:
    errors.InputError: there is one.
  """
  for name in flag_help.own_names():
    readers = flag_help.actions(flags.FLAGS[name].help or '', actions)
    if readers and action not in readers:
      refuse_idle([name], f'on {action!r}, it is for {", ".join(readers)}')


def refuse_idle(names: Iterable[str], why: str):
  """Refuses those of the flags that were given, because nothing reads them.

  Args:
    names: of flags.
    why: ends the sentence 'it has no effect', for example 'without --tasks'.

  Raises:
    errors.InputError: there is one.
  """
  for name in names:
    flag = flags.FLAGS[name]
    errors.require(not flag.present, f'--{name}={flag.value} has no effect {why}; leave it out')


def _module_of(main: Callable[..., object]) -> dict[str, Any]:
  """The names of the module that a command's `main` stands in."""
  return getattr(main, '__wrapped__', main).__globals__


def _is_program(main: Callable[..., object]) -> bool:
  """Whether this process is the command, not a notebook or a test that calls it."""
  return _module_of(main)['__name__'] == '__main__'


def _quietly(main: Callable[[Sequence[str]], object], argv: Sequence[str]) -> object:
  """`main(argv)` with huge pages, the compile cache, and without the chatter of libraries."""
  if _is_program(main):
    host_allocator.start_again_with_huge_pages()
  from moe_jax.devices import absent_tpu, compile_cache

  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # app.run leaves it at INFO, and JAX is talkative
  absent_tpu.use_cpu_where_nothing_else_is()
  try:
    compile_cache.enable(paths.cache_root(''))
  except errors.InputError as e:
    logging.warning(f'Compiled programs are not kept from one command to the next: {e}.')
  status = main(argv)
  for line in _WATCHDOGS:
    line.finish()
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    raise
  except OSError as e:
    raise errors.InputError(f'standard output cannot be written: {e.strerror or e}') from e
  return status


def _drop_unread_output():
  """Flushes standard output; drops what nobody reads, on which Python would fail at its end."""
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(status: int, reason: str):
  """Ends the command; of many processes, all of them."""
  for line in _WATCHDOGS:
    line.fail(reason, status)
  sys.exit(status)


class PageFlag(flags.Flag):
  """`--config`: its value is the page under its overrides, not yet checked; None if not given.

  With `repeated`, the value is the list of (spec, page) of all `--config`, and an override changes
  each of them.
  """

  def __init__(self, repeated: bool):
    self.repeated = repeated
    words = 'config page, by name or path: quickstart, routing:gshard, my/page.py:variant; '
    words += '--config.KEY=VALUE changes a value of it' + (', of all pages' if repeated else '')
    parser = flags.ArgumentParser()
    super().__init__(parser, flags.ArgumentSerializer(), 'config', None, words)

  def flag_type(self) -> str:
    return 'PAGE[:VARIANT]'

  def read(self, specs: Sequence[str], overrides: Sequence[str]):
    """Reads the pages that were given.

    Raises:
      errors.InputError: a page or a key is not there, or a value is of another type.
    """
    errors.require(
      self.repeated or len(specs) <= 1,
      f'--config is given {len(specs)} times ({", ".join(specs)}); give one page',
    )
    pages = [(spec, config_overrides.read(spec, overrides)) for spec in specs]
    self.value = pages if self.repeated else dict(pages).get(specs[0] if specs else '')


def config_flag(repeated: bool = False):
  """Defines `--config=PAGE[:VARIANT]` with `--config.KEY=VALUE` overrides of its (locked) keys."""
  flags.DEFINE_flag(PageFlag(repeated))


def workdir_flag(help_string: str, *, bucket: bool = False) -> flags.FlagHolder:
  """Defines `--workdir`; see `path_flag`."""
  return path_flag('workdir', None, help_string, bucket=bucket)


def adapter_flag() -> flags.FlagHolder:
  """Defines `--adapter`, whose value `moe_jax.load` takes."""
  return path_flag('adapter', '', 'adapter of experiments.esft extract, put onto the model')


class _PathParser(flags.ArgumentParser):
  def __init__(self, bucket: bool):
    self._bucket = bucket

  def parse(self, argument: str) -> str:
    if self._bucket and urls.is_remote(argument):
      return str(urls.parse(argument))
    return str(paths.local(argument)) if argument else ''

  def flag_type(self) -> str:
    return 'path'


def path_flag(
  name: str, default: str | None, help_string: str, *, bucket: bool = False
) -> flags.FlagHolder:
  """Defines a flag whose value is a path on this machine, see `paths.local`.

  With `bucket` it may be an address of object storage too, which the command has to resolve.
  """
  return flags.DEFINE(
    _PathParser(bucket), name, default, help_string, serializer=flags.ArgumentSerializer()
  )


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


# The watchdog of the connections to the other processes, once `start_processes` has found some.
_WATCHDOGS: list[watchdog.Watchdog] = []


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
    from moe_jax.processes import start
    from moe_jax.runs import run_record

    record = {**record, 'versions': run_record.versions()}
    _WATCHDOGS.append(start.initialize(place, given, record))


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
  try:
    return parse.from_dict(flag_value.to_dict())
  except errors.InputError as error:
    if 'config.model.moe.router=' not in str(error):
      raise
    raise errors.InputError(f'{error}{config_overrides.router_hint(flag_value)}') from error


def parse_flags(argv: Sequence[str], words: bool = False) -> list[str]:
  """Parses the command line in any order; returns what is no flag, the program's name first.

  Args:
    argv: the command line.
    words: whether there may be more than the program's name.

  Raises:
    errors.InputError: whatever can be wrong with a command line.
  """
  # FLAGS has no `get`.
  page = flags.FLAGS['config'] if 'config' in flags.FLAGS else None  # noqa: SIM401
  specs, overrides = [], []
  try:
    if page is not None:
      argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
      specs, overrides, argv = config_overrides.split(argv)
    rest = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    hint = errors.did_you_mean(
      f'--{error.flagname}', (f'--{name}' for name in flag_help.own_names())
    )
    raise errors.InputError(
      f'--{error.flagname} is no flag of this command{hint}; --help shows all of them'
    ) from error
  except flags.Error as error:
    raise errors.InputError(str(error)) from error
  except UnicodeDecodeError as error:
    raise errors.InputError(f'--flagfile must name a file of UTF-8 text ({error})') from error
  if len(rest) > 1 and not words:
    raise errors.InputError(f'unexpected argument {rest[1]!r}; all arguments are --name=value')
  errors.require(bool(specs) or not overrides, MISSING_CONFIG)
  if page is not None:
    page.read(specs, overrides)
  return rest
