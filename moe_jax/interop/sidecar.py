"""The small files beside the weights: tokenizer, settings of generation, how the files were made.

An import keeps them in the workdir's `hf/`, byte by byte, so that an export gives them back, with
`moe_jax.json` about what the tensors looked like.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from moe_jax import errors, trees
from moe_jax.data import json_files, kept_files, tokenizer_probe
from moe_jax.interop import mapping, safetensors_files, source

DIRECTORY, RECORD = kept_files.DIRECTORY, kept_files.RECORD
TOKENIZER, TOKENIZER_CONFIG = 'tokenizer.json', 'tokenizer_config.json'
# The code of older models is kept for those who run it; nothing here does.
_KEPT = ('.json', '.jinja', '.model', '.txt', '.md', '.py')
_LARGEST = 64 * 2**20  # bytes


class Record(NamedTuple):
  """What the tensors of an imported checkpoint looked like."""

  layout: mapping.Layout
  dtype: str  # of most tensors, a key of safetensors_files.DTYPES
  other_dtypes: Mapping[str, str]  # of the others, by name
  was_float8: bool
  untied: bool = False  # embedding and head, one matrix in the files, are trained as two


def keep(directory: pathlib.Path, into: pathlib.Path):
  """Copies the small files of a checkpoint that say what it is."""
  into.mkdir()
  for path in sorted(directory.iterdir()):
    known = path.suffix in _KEPT or path.name.startswith('LICENSE')
    own = path.name in (safetensors_files.INDEX, RECORD)
    if known and not own and path.is_file() and path.stat().st_size <= _LARGEST:
      shutil.copyfile(path, into / path.name)


def write_record(origin: source.Source, into: pathlib.Path, untied: bool = False):
  """Writes the `Record` of a source."""
  dtype, others = source.dtypes(origin)
  record = Record(origin.layout, dtype, others, origin.block is not None, untied)
  content = record._asdict() | {'layout': origin.layout._asdict()}
  (into / RECORD).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def read_record(workdir: pathlib.Path) -> Record | None:
  """The record of an imported workdir; None of another one."""
  path = workdir / DIRECTORY / RECORD
  if not path.is_file():
    return None
  content = source.read_json(path)
  try:
    layout = mapping.Layout(**content.pop('layout'))
    return Record(layout=layout, **content)
  except (KeyError, TypeError) as e:
    raise errors.InputError(
      f'{path} is not the record of an import ({e!r}); put the file back, or import again'
    ) from e


def special_tokens(directory: pathlib.Path, hf: trees.Json) -> tuple[str, str]:
  """Begin and end token of a checkpoint's tokenizer.json, by name.

  tokenizer_config.json names them, or special_tokens_map.json, or config.json has their ids.

  Raises:
    errors.InputError: there is no tokenizer.json, or one of the tokens is nowhere.
  """
  path = directory / TOKENIZER
  errors.require(
    path.is_file(),
    f'--from_hf={directory} holds no {TOKENIZER}, without which the model cannot read text; '
    'download it too (or save the fast tokenizer with transformers)',
  )
  named = [
    source.read_json(directory / name)
    for name in (TOKENIZER_CONFIG, 'special_tokens_map.json')
    if (directory / name).is_file()
  ]
  return _special_token('bos', named, hf, path), _special_token('eos', named, hf, path)


def _special_token(
  kind: str, named: Sequence[Mapping[str, Any]], hf: trees.Json, path: pathlib.Path
) -> str:
  for content in named:
    token = content.get(f'{kind}_token')
    if isinstance(token, Mapping):
      token = token.get('content')
    if isinstance(token, str):
      return token
  token_id = hf.get(f'{kind}_token_id')
  token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
  name = _token_name(path, token_id) if isinstance(token_id, int) else None
  return errors.present(
    name,
    f'--from_hf={path.parent}: neither {TOKENIZER_CONFIG} nor config.json says which token is '
    f'{kind}_token; add "{kind}_token" to {TOKENIZER_CONFIG}',
  )


def _token_name(path: pathlib.Path, token_id: int) -> str | None:
  try:
    content = json_files.read_object(path, 'download it again')
    problem, _ = tokenizer_probe.run(path.read_text(encoding='utf-8'))
    errors.require(not problem, problem)
    return tokenizers.Tokenizer.from_str(json.dumps(content)).id_to_token(token_id)
  except Exception as e:  # what `tokenizers` raises for a malformed file
    raise errors.InputError(f'{path} is not a readable tokenizer ({e}); download it again') from e
