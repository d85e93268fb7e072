"""Config pages, read by name ('quickstart'), by path ('configs/routing.py'), with ':variant'.

A page is a file with `get_config()` or `get_config(variant)`, which returns a ConfigDict. The pages
of this repository lie beside the package, in a clone as in an installed wheel.
"""

import importlib.util
import inspect
import os
import pathlib
import traceback
from types import ModuleType

import ml_collections

from moe_jax import errors
from moe_jax.config import parse, schema

FOLDER = pathlib.Path(__file__).parents[2] / 'configs'


def read(spec: str) -> schema.Config:
  """The checked config of a page, see `values`.

  Raises:
    errors.InputError: there is no such page or variant, or a value in it breaks a rule.
  """
  return parse.from_dict(values(spec).to_dict())


def values(spec: str) -> ml_collections.ConfigDict:
  """The values of a page before they are checked.

  Args:
    spec: `name` of a page in configs/, or a path `page.py`; either with `:variant`.

  Raises:
    errors.InputError: there is no such page or variant, or its program fails.
  """
  path, _, variant = spec.partition(':')
  file = find(path)
  get_config = getattr(_load(file), 'get_config', None)
  if get_config is None:
    raise errors.InputError(f'--config={spec}: {path} is no config page, it has no get_config()')
  arguments = (variant,) if variant else ()
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    problem = f'takes no variant {variant!r}' if variant else 'needs a variant, PAGE:VARIANT'
    raise errors.InputError(f'--config={spec}: {path} {problem}') from None
  try:
    found = get_config(*arguments)
  except Exception as error:  # a page is a program of the user's: a slip in it may raise anything
    raise errors.InputError(f'--config={spec}: {_problem(error, file)}') from error
  if not isinstance(found, ml_collections.ConfigDict):
    raise errors.InputError(
      f'--config={spec}: get_config() must return a ConfigDict, not {type(found).__name__}; begin '
      'with config = base.get_config() and end with return config'
    )
  return found


def find(path: str) -> pathlib.Path:
  """The file of a page: `path` itself, or else the page of that name in configs/.

  Raises:
    errors.InputError: there is neither.
  """
  file = pathlib.Path(path)
  if not file.name:
    raise errors.InputError(
      f'--config={path} names no config page; give one, for example --config=quickstart'
    )
  if file.suffix == '.py' and os.path.isfile(file):  # False too where no file can have the name
    return file
  own = FOLDER / file.with_suffix('.py').name
  named = file.suffix in ('', '.py') and file.parent in (pathlib.Path(), pathlib.Path('configs'))
  if named and os.path.isfile(own) and not own.name.startswith('_'):
    return own
  folder = file.parent if file.suffix == '.py' else FOLDER
  there = folder.glob('*.py') if os.path.isdir(folder) else ()
  pages = [page for page in there if not page.name.startswith('_')]
  names = [str(page) if file.suffix == '.py' else page.stem for page in pages]
  if file.suffix == '.py' and file.parent == pathlib.Path('configs'):
    names += [f'configs/{page.name}' for page in FOLDER.glob('*.py')]
  hint = errors.did_you_mean(path, names)
  raise errors.InputError(f'--config={path}: there is no such config page{hint}')


def _load(file: pathlib.Path) -> ModuleType:
  spec = importlib.util.spec_from_file_location(f'config_page_{file.stem}', file)
  assert spec and spec.loader, file  # `find` returns *.py only
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise errors.InputError(f'--config={file}: line {error.lineno}: {error.msg}') from error
  except Exception as error:
    raise errors.InputError(f'--config={file}: {_problem(error, file)}') from error
  return module


def _problem(error: Exception, file: pathlib.Path) -> str:
  """What a page has raised; if it did not mean to refuse a value, the kind and its own line too."""
  if isinstance(error, ValueError):
    return str(error)
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file.absolute()]
  where = f'line {lines[-1]}: ' if lines else ''
  return f'{where}{type(error).__name__}: {error}'
