"""The small files of a downloaded checkpoint that a workdir keeps in `hf/`.

An import puts them there (`interop.sidecar`), a run that starts from its weights takes them along,
and an export gives them back: tokenizer, chat template, settings of generation. They also say which
tokens end a text.
"""

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax import errors
from moe_jax.data import json_files
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.storage import fetch

DIRECTORY, RECORD = 'hf', 'moe_jax.json'
_WAY_OUT = 'download it again'


def carry(source: pathlib.Path, workdir: pathlib.Path):
  """Copies the kept files of a workdir, if it has any, into another that has none yet."""
  if (source / DIRECTORY).is_dir():
    put(workdir, lambda target: shutil.copytree(source / DIRECTORY, target))


def carry_without_model(source: pathlib.Path, workdir: pathlib.Path):
  """As `carry`, into a workdir of another model: without what says how weights are named and read.

  End tokens that config.json alone names go into generation_config.json.
  """
  kept = source / DIRECTORY
  if not kept.is_dir():
    return

  def write(target: pathlib.Path):
    shutil.copytree(kept, target, ignore=shutil.ignore_patterns('config.json', RECORD))
    ids = _ids(kept / 'config.json')
    if ids and not _ids(target / 'generation_config.json'):
      text = json.dumps({'eos_token_id': ids})
      (target / 'generation_config.json').write_text(text, encoding='utf-8')

  put(workdir, write)


def put(workdir: pathlib.Path, write: Callable[[pathlib.Path], object]):
  """Gives a workdir that has no kept files those that `write` makes in a directory, or none."""
  target = workdir / DIRECTORY
  if target.exists():
    return
  temporary = target.with_name(f'.{DIRECTORY}.{uuid.uuid4().hex}')
  try:
    write(temporary)
    temporary.rename(target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)  # renamed away if all went well


def is_tied(workdir: pathlib.Path) -> bool:
  """Whether a workdir is of an import whose output head is its embedding, and is to stay so."""
  kept = workdir / DIRECTORY
  if not (kept / 'config.json').is_file():
    return False
  tied = bool(json_files.read_object(kept / 'config.json', _WAY_OUT).get('tie_word_embeddings'))
  return tied and not json_files.read_object(kept / RECORD, _WAY_OUT).get('untied')


def require_untied(workdir: str | os.PathLike[str], field: str):
  """Refuses to train two matrices that are one in the files of an import.

  Imports of before there was `model.tie_embeddings` hold it twice.

  Raises:
    errors.InputError: names the field and the ways out.
  """
  errors.require(
    not is_tied(fetch.local(workdir)),
    f'{field}={workdir} has one matrix as embedding and output head (tie_word_embeddings), and '
    'this config would train two, each for itself; set config.model.tie_embeddings=True after '
    'importing it again with experiments.convert, or import it with --untie to train them as two, '
    'which is what an export holds then',
  )


def chat_template(directory: pathlib.Path) -> str:
  """The jinja template by which a checkpoint writes conversations; '' if its files have none.

  chat_template.jinja comes first. In tokenizer_config.json there may be several with names, of
  which the one called 'default' is taken.

  Raises:
    errors.InputError: a file cannot be read, or holds something else than templates.
  """
  path = directory / 'chat_template.jinja'
  if path.is_file():
    try:
      return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
      raise errors.InputError(f'{path} must be readable UTF-8 text ({e}); {_WAY_OUT}') from e
  path = directory / 'tokenizer_config.json'
  found = json_files.read_object(path, _WAY_OUT).get('chat_template') if path.is_file() else None
  if isinstance(found, list):
    named = {one['name']: one.get('template') for one in found if _is_named(one)}
    found = named.get('default')
  errors.require(
    found is None or isinstance(found, str),
    f'{path}: chat_template must be a text, or a list of objects with "name" and "template"; '
    f'{_WAY_OUT}',
  )
  return found or ''


def _is_named(one: Any) -> bool:
  return isinstance(one, Mapping) and isinstance(one.get('name'), str)


def end_ids(directory: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, ...]:
  """Ids that end a text: the tokenizer's end token, and what the files of a checkpoint add.

  generation_config.json decides, and config.json where that says nothing, as in transformers;
  tokenizer_config.json may name another one, for example the end of a turn.

  Args:
    directory: of the files; each may be absent.
    tokenizer: of the same checkpoint.

  Raises:
    errors.InputError: a file cannot be read, or holds something else than ids.
  """
  found = _ids(directory / 'generation_config.json') or _ids(directory / 'config.json')
  path = directory / 'tokenizer_config.json'
  named = json_files.read_object(path, _WAY_OUT).get('eos_token') if path.is_file() else None
  named = named.get('content') if isinstance(named, Mapping) else named
  named_id = tokenizer.token_id(named) if isinstance(named, str) else None
  found += [] if named_id is None else [named_id]
  return tuple(dict.fromkeys([tokenizer.eos_id, *found]))


def _ids(path: pathlib.Path) -> list[int]:
  """`eos_token_id` of a file, an id or a list of them; [] without it."""
  if not path.is_file():
    return []
  value: Any = json_files.read_object(path, _WAY_OUT).get('eos_token_id')
  ids = [] if value is None else value if isinstance(value, list) else [value]
  errors.require(
    all(type(i) is int and 0 <= i < 2**31 for i in ids),
    f'{path}: eos_token_id={value!r} must be a token id, or a list of them; correct it',
  )
  return ids
