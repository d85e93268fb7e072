"""Config pages, read by name ('quickstart'), by path ('configs/routing.py'), with ':variant'.

A page is a file with `get_config()` or `get_config(variant)`, which returns a ConfigDict. The pages
of this repository lie beside the package, in a clone as in an installed wheel.
"""

import importlib.util
import inspect
import pathlib
from types import ModuleType

import ml_collections

from moe_jax import errors
from moe_jax.config import parse, schema

FOLDER = pathlib.Path(__file__).parents[2] / 'configs'

# What a slip in a page raises: ConfigDict answers a mistyped value with TypeError, for example.
_MISTAKES = (ValueError, TypeError, AttributeError, KeyError, NameError, ImportError)


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
    errors.InputError: there is no such page or variant.
  """
  path, _, variant = spec.partition(':')
  get_config = getattr(_load(find(path)), 'get_config', None)
  if get_config is None:
    raise errors.InputError(f'--config={spec}: {path} is no config page, it has no get_config()')
  arguments = (variant,) if variant else ()
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    problem = f'takes no variant {variant!r}' if variant else 'needs a variant, PAGE:VARIANT'
    raise errors.InputError(f'--config={spec}: {path} {problem}') from None
  try:
    return get_config(*arguments)
  except _MISTAKES as error:  # ValueError is how pages refuse a variant
    raise errors.InputError(f'--config={spec}: {error}') from error


def find(path: str) -> pathlib.Path:
  """The file of a page: `path` itself, or else the page of that name in configs/.

  Raises:
    errors.InputError: there is neither.
  """
  file = pathlib.Path(path)
  if file.suffix == '.py' and file.is_file():
    return file
  own = FOLDER / file.with_suffix('.py').name
  named = file.suffix in ('', '.py') and file.parent in (pathlib.Path(), pathlib.Path('configs'))
  if named and own.is_file() and not own.name.startswith('_'):
    return own
  folder = file.parent if file.suffix == '.py' else FOLDER
  pages = [page for page in folder.glob('*.py') if not page.name.startswith('_')]
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
  except _MISTAKES as error:
    raise errors.InputError(f'--config={file}: {error}') from error
  return module
