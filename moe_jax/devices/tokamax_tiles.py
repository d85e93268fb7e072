"""tokamax, the library of GPU kernels, with the tiles that were measured for this kind of GPU.

A kernel looks its tiles up by device kind and exact shape, and falls back to a rule of thumb that
is far from the best. What `python -m experiments.bench.tune` has measured on a GPU lies in
configs/tuned/, a file per kind of device, and is entered into the library's own table when it is
first asked for, once per process: what is traced does not depend on it, so nothing is traced twice.
Shapes that no file knows are looked up in the table that tokamax ships, then left to the rule.
"""

import functools
import importlib.util
import logging
import pathlib
import re
import types

from absl import flags
from jax.extend import backend

import moe_jax
from moe_jax import errors

DIRECTORY = pathlib.Path(moe_jax.__file__).parents[1] / 'configs' / 'tuned'


def load(who: str) -> types.ModuleType:
  """The module tokamax, ready for use.

  Args:
    who: the config value that needs it, for the message.

  Raises:
    errors.InputError: it is not installed.
  """
  errors.require(
    importlib.util.find_spec('tokamax') is not None,
    f"{who} needs the package tokamax; install the extra: pip install 'moe_jax[cuda]'",
  )
  import tokamax

  # tokamax reads absl flags, and parses the command line itself (any program's) if nobody has.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  enter(backend.get_default_device().device_kind)
  return tokamax


def path_of(device_kind: str, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
  """Where the tiles of a kind of device are: 'NVIDIA H200' -> nvidia_h200.json."""
  return directory / f'{re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")}.json'


@functools.cache
def enter(device_kind: str, directory: pathlib.Path = DIRECTORY) -> int:
  """Enters the measured tiles of a kind of device into tokamax's table; how many programs they are.

  Raises:
    errors.InputError: the file is not one of tokamax's, or of another kind of device.
  """
  from tokamax import AutotuningResult

  path = path_of(device_kind, directory)
  if not path.is_file():
    if 'NVIDIA' in device_kind:
      logging.getLogger(__name__).warning(
        'no tiles were measured for %r: tokamax falls back to its own table, and where that has '
        'none to a rule of thumb; python -m experiments.bench.tune makes %s',
        device_kind,
        path,
      )

      # It says as much of every kernel, in a page of its arguments.
      def spoken(record):
        return not str(record.msg).startswith('Autotuning cache miss')

      logging.getLogger('absl').addFilter(spoken)
    return 0
  try:
    tiles = AutotuningResult.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise errors.InputError(
      f'{path} was not written by a tokamax like this one; run python -m experiments.bench.tune '
      'again, or delete the file'
    ) from e
  errors.require(
    tiles.device_kind == device_kind,
    f'{path} holds the tiles of {tiles.device_kind!r}, not of {device_kind!r}; delete the file, or '
    'run python -m experiments.bench.tune',
  )
  for bound, data in tiles.data:
    bound.op.get_autotuning_cache(device_kind)[bound.autotuning_cache_key] = data
  return len(tiles.data)
