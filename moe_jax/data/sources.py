"""Where text comes from: each source yields documents, which are a name, UTF-8 text and a domain.

A name is the same on every machine (a path below its root, a line of a file), because a hash of it
decides whether the document is trained on or held out. Documents without any text are left out.
"""

import codecs
import dataclasses
import importlib
import io
import json
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import tqdm
from absl import logging

from moe_jax import errors
from moe_jax.config import paths, schema
from moe_jax.data import (
  cache,
  conversations,
  hashing,
  json_files,
  preferences,
  source_files,
  synthetic,
)
from moe_jax.data.tasks import episodes, generated
from moe_jax.storage import fetch

TEXT_CUT_BYTES = 64 * 1024  # source 'text': files longer than this become several documents
_Parsed = TypeVar('_Parsed')
_CHAT_COLUMNS = ('messages', 'prompt', 'completion', 'chosen', 'rejected')
_SKIPPED_DIRS = frozenset({'site-packages', 'dist-packages', '__pycache__'})


@dataclasses.dataclass(frozen=True)
class Document:
  """One unit of text: never packed across, wholly trained on or wholly held out."""

  name: str
  text: bytes  # UTF-8
  domain: str


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a source needs to know; fields as in `schema.DataConfig`."""

  section: (
    str  # where it stands in the config, for error messages: 'config.data' or '...mixture.<label>'
  )
  source: str
  path: str
  text_field: str
  domain_field: str
  synthetic_documents: int
  cache_dir: pathlib.Path
  progress: bool  # show a bar for a download
  skip_null: bool = False  # leave out rows whose text is null
  # What reading it came upon: file -> its name, which decides whether it is held out.
  files: dict[pathlib.Path, str] = dataclasses.field(default_factory=dict, compare=False)

  @property
  def where(self) -> str:
    """The start of every error message about this source."""
    return f'{self.section}.path={self.path!r} (source {self.source!r})'


def specs(data: schema.DataConfig, *, progress: bool = False) -> dict[str, Spec]:
  """One `Spec` per member of the mixture, by domain label; any other source is {'': spec}."""
  members = {'': data}
  if data.source == 'mixture':
    members = {label: data.mixture[label] for label in sorted(data.mixture)}
  return {
    label: Spec(
      section=f'config.data.mixture.{label}' if label else 'config.data',
      source=member.source,
      path=member.path,
      text_field=data.text_field,
      domain_field=data.domain_field,
      synthetic_documents=data.synthetic_documents,
      cache_dir=paths.cache_root(data.cache_dir),
      progress=progress,
      skip_null=data.skip_null_text,
    )
    for label, member in members.items()
  }


def read(spec: Spec, *, quiet: bool = False) -> Iterator[Document]:
  """Yields the documents of a source in a fixed order.

  Args:
    spec: the source.
    quiet: for a later pass over the same documents: no second warning about skipped files.

  Raises:
    errors.InputError: something is missing, unreadable or malformed.
  """
  warn = (lambda message: None) if quiet else logging.warning
  return (document for document in SOURCES[spec.source](spec, warn) if document.text)


def is_heldout(name: str, heldout_fraction: float) -> bool:
  """Whether `name` is kept for evaluation: a hash decides, not its content, place or order."""
  return hashing.uniform('heldout', name) < heldout_fraction


def python_source(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """All .py files under the roots; without a root, the standard library of the running interpreter.

  Domain: the first directory of the path below the root, or 'top'. Installed packages
  (site-packages) are left out. Files that cannot be read, or decoded as PEP 263 says, are skipped
  and counted in a warning.
  """
  skipped: list[str] = []
  seen: set[pathlib.Path] = (
    set()
  )  # roots may overlap: a file under two names could be in both splits
  for pattern in source_files.split(spec.path) or [sysconfig.get_path('stdlib')]:
    root = fetch.local(pattern, f'{spec.section}.path')
    if not root.is_dir():
      raise errors.InputError(
        f'{spec.where} must name directories, and {pattern!r} is none; correct it, or leave it '
        'empty for the standard library'
      )
    for name in _python_files(root, skipped):
      resolved = (root / name).resolve()
      if resolved in seen:
        continue
      seen.add(resolved)
      spec.files[resolved] = name
      try:
        text = _decode_python((root / name).read_bytes())
      except (OSError, SyntaxError, UnicodeError, LookupError):
        skipped.append(name)
        continue
      yield Document(name, text, name.split('/')[0] if '/' in name else 'top')
  if skipped:
    warn(
      f'{spec.where}: skipped {len(skipped)} that could not be read or decoded: '
      f'{", ".join(skipped[:3])}{", ..." if len(skipped) > 3 else ""}'
    )


def _python_files(root: pathlib.Path, skipped: list[str]) -> list[str]:
  """Paths of the .py files below `root`, relative to it, with forward slashes, sorted."""
  names = []
  for folder, subfolders, files in os.walk(root, onerror=lambda e: skipped.append(str(e.filename))):
    subfolders[:] = [d for d in subfolders if d not in _SKIPPED_DIRS]
    below = pathlib.Path(folder).relative_to(root)
    names += [(below / file).as_posix() for file in files if file.endswith('.py')]
  return sorted(names)


def _decode_python(data: bytes) -> bytes:
  """Python source in its declared encoding (PEP 263) to UTF-8 without a byte-order mark."""
  encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
  return data.decode(encoding).encode('utf-8')


def text_files(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """One document per file, long files cut into several at line ends.

  Domain: the file's folder as the path spells it; without one, its stem.
  """
  for name, file in _files(spec):
    data = _read_bytes(spec, file).removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
      raise errors.InputError(
        f'{spec.where} must hold UTF-8 text, and {str(file)!r} is UTF-16 by its byte order mark; '
        'convert it with iconv -f UTF-16 -t UTF-8'
      )
    try:
      data.decode('utf-8')
    except UnicodeDecodeError as e:
      raise errors.InputError(
        f'{spec.where} must hold UTF-8 text, and {str(file)!r} does not ({e}); convert it with '
        'iconv, or leave it out'
      ) from e
    folder = file.parent.name
    domain = folder if folder not in ('', '..') else file.stem
    for i, part in enumerate(_cut_at_lines(data)):
      yield Document(f'{name}#{i}' if i else name, part, domain)


def _cut_at_lines(data: bytes) -> Iterator[bytes]:
  """Pieces of at least TEXT_CUT_BYTES (but the last): one book must fill both splits."""
  begin = 0
  while begin < len(data):
    line_end = data.find(b'\n', begin + TEXT_CUT_BYTES)
    end = len(data) if line_end < 0 else line_end + 1
    yield data[begin:end]
    begin = end


def jsonl(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """One document per line. Domain: data.domain_field, or the file's stem."""
  for name, file in _files(spec, '.jsonl'):
    yield from _jsonl_documents(spec, file, name, source_files.stem(file), warn)


def _jsonl_documents(
  spec: Spec, file: pathlib.Path, name: str, domain: str, warn: Callable[[str], None]
) -> Iterator[Document]:
  lines = enumerate(_lines(spec, file), start=1)
  rows = ((n, _parse(spec, line, f'{file}:{n}')) for n, line in lines if line.strip())
  yield from _records(spec, rows, name, domain, warn)


def _lines(spec: Spec, file: pathlib.Path) -> Iterator[bytes]:
  """The lines of a file, decompressed, without a byte order mark."""
  try:
    with _opened(spec, file) as lines:
      for number, line in enumerate(lines):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)
  except errors.InputError:
    raise
  except Exception as e:  # each library of a compression has errors of its own
    raise _unreadable(spec, file, e) from e


def _parse(spec: Spec, line: bytes, where: str) -> Any:
  try:
    return json_files.parse(line)
  except ValueError as e:
    raise errors.InputError(
      f'{spec.where}: {where} must be a JSON object on one line ({e}); repair or remove the line'
    ) from e


def parquet(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """One document per row. Domain: data.domain_field, or the file's stem."""
  for name, file in _files(spec, '.parquet'):
    yield from _records(spec, enumerate(_parquet_rows(spec, file)), name, file.stem, warn)


def _parquet_rows(
  spec: Spec, file: pathlib.Path, every_column: bool = False
) -> Iterator[Mapping[str, Any]]:
  library = _optional(spec, 'pyarrow.parquet', 'pyarrow')
  try:
    with library.ParquetFile(file) as table:
      wanted = [field for field in (spec.text_field, spec.domain_field) if field]
      # Where one is missing all are read, so that the error can name those that exist.
      if every_column or not set(wanted) <= set(table.schema_arrow.names):
        wanted = None
      for batch in table.iter_batches(batch_size=1024, columns=wanted):
        yield from batch.to_pylist()
  except Exception as e:  # pyarrow has errors of its own for each kind of damage
    raise _unreadable(spec, file, e) from e


def hugging_face(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """A Hugging Face dataset, streamed once into the cache and read there.

  The path is its name, or a directory, with what else chooses it behind a question mark:
  'allenai/c4?name=en&split=validation&revision=main'; the split is 'train' if none is given. A
  local one whose files have changed is read anew.

  Domain: data.domain_field, or the dataset's name.
  """

  def texts(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for document in _records(spec, enumerate(rows, start=1), spec.path, spec.path, warn):
      yield {'text': document.text.decode('utf-8'), 'domain': document.domain}

  stored = dataclasses.replace(spec, text_field='text', domain_field='domain')
  yield from _jsonl_documents(stored, _downloaded(spec, texts), spec.path, spec.path, warn)


_Keep = Callable[[Iterable[Mapping[str, Any]]], Iterator[dict[str, Any]]]


def _downloaded(spec: Spec, keep: _Keep) -> pathlib.Path:
  """The JSON lines that `keep` makes of the rows of a data set, in the cache."""
  changes = (*source_files.stamp(_dataset(spec)[0]), *(('skip null',) if spec.skip_null else ()))
  changes += () if spec.source == 'hf' else (spec.source,)
  key = hashing.hexdigest(spec.path, spec.text_field, spec.domain_field, *changes)
  directory = cache.get_or_build(
    spec.cache_dir / 'hf' / key,
    lambda temporary: _download(spec, temporary / 'data.jsonl', keep),
    lambda target: (target / 'data.jsonl').is_file(),
  )
  return directory / 'data.jsonl'


def _dataset(spec: Spec) -> tuple[str, dict[str, str]]:
  """What loads a data set: its name or place, and name, split and revision as given.

  Raises:
    errors.InputError: something else is asked for.
  """
  place, mark, text = spec.path.partition('?')
  if not mark or os.path.exists(spec.path):
    return spec.path, {'split': 'train'}
  options = {key: value for key, _, value in (part.partition('=') for part in text.split('&'))}
  known = ('name', 'split', 'revision')
  errors.require(
    all(key in known and value for key, value in options.items()),
    f'{spec.where}: behind the question mark may stand {", ".join(known)}, as in '
    f'{place}?name=en&split=train&revision=main; it has {text!r}',
  )
  return place, {'split': 'train'} | options


def _download(spec: Spec, file: pathlib.Path, keep: _Keep):
  library = _optional(spec, 'datasets', 'datasets')
  try:
    place, options = _dataset(spec)
    rows = library.load_dataset(place, **options, streaming=True)
  except errors.InputError:
    raise
  except Exception as e:  # the library has many, and those of the file formats besides
    raise errors.InputError(
      f'{spec.where} must name a Hugging Face dataset with a split {options["split"]!r} ({e}); '
      "correct the name, check the network, or use source='jsonl' with a local copy"
    ) from e
  bar = tqdm.tqdm(
    _streamed(spec, rows),
    f'download {spec.path}',
    unit='doc',
    disable=None if spec.progress else True,
  )
  with file.open('w', encoding='utf-8') as out, bar:
    for line in keep(bar):
      out.write(json.dumps(line) + '\n')


def _streamed(spec: Spec, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
  """The rows, of which each is fetched and parsed only now."""
  number = 0
  try:
    for row in rows:
      yield row
      number += 1
  except Exception as e:
    raise errors.InputError(
      f'{spec.where}: the row behind {number:,} cannot be read ({e}); check the network, repair a '
      "local file, or use source='jsonl' with a copy"
    ) from e


def synthetic_text(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """`data.synthetic_documents` documents of made-up text in four domains; see `synthetic`.

  A path names the domains of which they are taken: 'code,arithmetic'; '' is all of them.
  """
  chosen = [name.strip() for name in spec.path.split(',') if name.strip()]
  for name in chosen:
    errors.require(
      name in synthetic.DOMAINS,
      f'{spec.where} must name domains of made-up text, {", ".join(synthetic.DOMAINS)}, or be '
      f'empty for all of them; it has {name!r}{errors.did_you_mean(name, synthetic.DOMAINS)}',
    )
  for name, text, domain in synthetic.documents(spec.synthetic_documents, chosen):
    yield Document(name, text.encode('utf-8'), domain)


def conversation_files(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """One document per conversation; see `conversations`, whose bytes are its text.

  Conversations without a turn to be learned are left out and counted in a warning.
  """
  nothing = 0
  for where, found, domain in _chat_rows(spec, conversations.from_row):
    if conversations.is_learned(found):
      yield Document(where, conversations.to_bytes(found), domain)
    else:
      nothing += 1
  if nothing:
    warn(f'{spec.where}: left out {nothing} conversations in which nothing is to be learned')


def preference_files(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """One document per pair of answers; see `preferences`, whose bytes are its text."""
  for where, found, domain in _chat_rows(spec, preferences.from_row):
    yield Document(where, preferences.to_bytes(found), domain)


def _chat_rows(
  spec: Spec, from_row: Callable[[Any], _Parsed]
) -> Iterator[tuple[str, _Parsed, str]]:
  """Yields (name, what `from_row` makes of it, domain) of every row.

  Files are JSON lines (.jsonl, also .gz and .zst) or parquet; a Hugging Face dataset is named and
  kept as by `hugging_face`. Domain: data.domain_field, which some of the rows must have, or else
  the file's stem or the dataset's name.
  """

  def parsed(row: Any, where: str) -> _Parsed:
    try:
      return from_row(row)
    except ValueError as e:
      raise errors.InputError(f'{spec.where}: {where} {e}; repair or remove it') from e

  def kept(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    numbered = ((f'{spec.path}:{n}', row, '') for n, row in enumerate(rows, start=1))
    for where, row, _ in _some_with_domain(spec, numbered):
      parsed(row, where)  # before anything is cached
      yield {key: row[key] for key in (*_CHAT_COLUMNS, spec.domain_field) if key in row}

  for where, row, label in _some_with_domain(spec, _rows_of_files(spec, kept)):
    found = parsed(row, where)
    has_domain = spec.domain_field in row
    yield where, found, (_domain(spec, row, where, label) if has_domain else label) or label


def _rows_of_files(spec: Spec, kept: _Keep) -> Iterator[tuple[str, Any, str]]:
  """Yields (name, row, label of its file) of a source of conversations, which may be no mapping."""
  if spec.source.startswith('hf_'):
    files = [(spec.path, _downloaded(spec, kept), spec.path)]
  else:
    named = _files(spec, '.jsonl', '.parquet')
    files = [(name, file, source_files.stem(file)) for name, file in named]
  for name, file, label in files:
    if file.suffix == '.parquet':
      rows = enumerate(_parquet_rows(spec, file, every_column=True))
    else:
      lines = enumerate(_lines(spec, file), start=1)
      rows = ((n, _parse(spec, line, f'{file}:{n}')) for n, line in lines if line.strip())
    for number, row in rows:
      yield f'{name}:{number}', row, label


def _some_with_domain(
  spec: Spec, rows: Iterable[tuple[str, Any, str]]
) -> Iterator[tuple[str, Any, str]]:
  """The rows; refuses at their end a data.domain_field that none of them has."""
  first, has_domain = None, not spec.domain_field
  for one in rows:
    yield one
    first = first or one
    has_domain = has_domain or spec.domain_field in one[1]
  if first and not has_domain:
    raise errors.InputError(
      f'config.data.domain_field={spec.domain_field!r} is a field of no row of {spec.where}; '
      f'{first[0]} has {", ".join(map(repr, first[1]))}: set config.data.domain_field to one of '
      "these, or to ''"
    )


def generated_task(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """Conversations about generated problems, each question once; see `tasks.generated`.

  The path says how hard they are. A question's name is its text, by whose hash it is trained on or
  held out.
  """
  for one, conversation in generated.questions(spec.source, spec.path, spec.where):
    yield Document(one.question, conversations.to_bytes(conversation), one.label)


def episodes_task(spec: Spec, warn: Callable[[str], None]) -> Iterator[Document]:
  """Conversations whose answers are label words, drawn anew for each; see `tasks.episodes`.

  The path says how they are, '' or for example '?classes=4&queries=9&words=3&episodes=10000'. An
  episode's name is its text, by whose hash it is trained on or held out.
  """
  task, count = episodes.of_path(spec.path, spec.where)
  for number in range(count):
    text = conversations.to_bytes(episodes.conversation(episodes.episode(number, task)))
    yield Document(hashing.hexdigest(text), text, f'{task.classes} classes')


SOURCES: dict[str, Callable[[Spec, Callable[[str], None]], Iterator[Document]]] = {
  'python_source': python_source,
  'text': text_files,
  'jsonl': jsonl,
  'parquet': parquet,
  'hf': hugging_face,
  'synthetic': synthetic_text,
  'conversations': conversation_files,
  'arithmetic': generated_task,
  'programs': generated_task,
  'episodes': episodes_task,
  'preferences': preference_files,
  'hf_conversations': conversation_files,
  'hf_preferences': preference_files,
}


def _records(
  spec: Spec,
  rows: Iterable[tuple[int, Any]],
  name: str,
  domain: str,
  warn: Callable[[str], None],
) -> Iterator[Document]:
  """A document per numbered row; rows whose text is null are left out and counted, if asked for."""
  skipped = 0
  for number, row in rows:
    null = isinstance(row, Mapping) and row.get(spec.text_field, '') is None
    if null and spec.skip_null:
      skipped += 1
      continue
    yield _record(spec, row, f'{name}:{number}', domain)
  if skipped:
    warn(f'{spec.where}: skipped {skipped} rows of {name} whose {spec.text_field!r} is null')


def _record(spec: Spec, row: Any, where: str, domain: str) -> Document:
  """Turns one row with named fields into a document called `where`."""
  text = _field(spec, row, 'text_field', where)
  try:
    data = text.encode('utf-8')
  except (AttributeError, UnicodeEncodeError) as e:
    raise errors.InputError(
      f'{spec.where}: field {spec.text_field!r} of {where} must be a string of Unicode text, not '
      f'{ascii(text):.40}; repair or remove that document'
      + ('' if text is not None else ', or set config.data.skip_null_text=True')
    ) from e
  return Document(where, data, _domain(spec, row, where, domain))


def _domain(spec: Spec, row: Any, where: str, default: str) -> str:
  """The domain that a row names in data.domain_field; `default` without that field."""
  if not spec.domain_field:
    return default
  domain = str(_field(spec, row, 'domain_field', where))
  try:
    domain.encode('utf-8')
  except UnicodeEncodeError as e:
    raise errors.InputError(
      f'{spec.where}: field {spec.domain_field!r} of {where} must be Unicode text, not '
      f'{ascii(domain):.40}; repair or remove that document'
    ) from e
  return domain


def _field(spec: Spec, row: Any, option: str, where: str) -> Any:
  """What a row holds in the field that data.text_field or data.domain_field names."""
  field = getattr(spec, option)
  if not isinstance(row, Mapping) or field not in row:
    known = ', '.join(map(repr, row)) if isinstance(row, Mapping) else 'no fields at all'
    raise errors.InputError(
      f'config.data.{option}={field!r} must be a field of every document; {where} of '
      f'{spec.where} has {known}: set config.data.{option} to one of its fields'
    )
  return row[field]


def _files(spec: Spec, *suffixes: str) -> list[tuple[str, pathlib.Path]]:
  """The files that a source's path names, see `source_files.named`."""
  found = source_files.named(spec.path, spec.where, f'{spec.section}.path', suffixes)
  spec.files.update({file.resolve(): name for name, file in found})
  return found


def _read_bytes(spec: Spec, file: pathlib.Path) -> bytes:
  try:
    with _opened(spec, file) as stream:
      return stream.read()
  except errors.InputError:
    raise
  except Exception as e:
    raise _unreadable(spec, file, e) from e


def _opened(spec: Spec, file: pathlib.Path) -> Any:
  return source_files.opened(file, lambda module, package: _optional(spec, module, package))


def _unreadable(spec: Spec, file: pathlib.Path, error: Exception) -> errors.InputError:
  return errors.InputError(
    f'{spec.where}: cannot read {str(file)!r} ({error}); make it readable, or leave it '
    'out of the path'
  )


def _optional(spec: Spec, module: str, package: str) -> Any:
  """Imports a library that only this source needs."""
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise errors.InputError(
      f'{spec.section}.source={spec.source!r} needs the package {package!r}; install the extra '
      f"'hf' (pip install 'moe_jax[hf]', or -e '.[hf]' in a clone), or choose another source"
    ) from e
