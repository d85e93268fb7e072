import gzip
import io
import json
import logging
import pathlib
import shutil
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import conversations, preferences, sources


def read(spec: sources.Spec) -> dict[str, tuple[str, str]]:
  """{name: (text, domain)} of a source."""
  return {d.name: (d.text.decode('utf-8'), d.domain) for d in sources.read(spec)}


def write_tree(root: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
  for name, content in files.items():
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))
  return root


def test_specs_of_a_mixture_are_sorted_by_label(make_config):
  mixture = {
    'b': schema.MixtureComponent('synthetic', '', 1.0),
    'a': schema.MixtureComponent('text', 'x.txt', 2.0),
  }
  specs = sources.specs(make_config(source='mixture', mixture=mixture))
  assert list(specs) == ['a', 'b']
  assert specs['a'].where == "config.data.mixture.a.path='x.txt' (source 'text')"


# python_source


def test_python_source(make_spec, tmp_path):
  root = write_tree(
    tmp_path / 'r',
    {
      'a.py': 'a = 1\n',
      'pkg/b.py': 'b = 2\n',
      'pkg/sub/c.py': 'c = "é"\n',
      'pkg/notes.txt': 'no',
      'empty.py': '',
      'pkg/__pycache__/d.py': 'no',
      'site-packages/e.py': 'no',
      'pkg/dist-packages/f.py': 'no',
    },
  )
  documents = read(make_spec('python_source', root))
  assert documents == {
    'a.py': ('a = 1\n', 'top'),
    'pkg/b.py': ('b = 2\n', 'pkg'),
    'pkg/sub/c.py': ('c = "é"\n', 'pkg'),
  }
  assert list(documents) == sorted(documents)


def test_python_source_of_several_roots_and_elsewhere(make_spec, tmp_path):
  one = write_tree(tmp_path / 'one', {'a.py': 'a', 'm/b.py': 'b'})
  two = write_tree(tmp_path / 'two', {'c.py': 'c'})
  moved = shutil.copytree(one, tmp_path / 'elsewhere' / 'deep')
  assert list(read(make_spec('python_source', f'{one}, {two}'))) == ['a.py', 'm/b.py', 'c.py']
  assert list(sources.read(make_spec('python_source', one))) == list(
    sources.read(make_spec('python_source', moved))
  )


def test_python_source_decodes_as_pep_263_and_counts_what_it_skips(make_spec, tmp_path, caplog):
  root = write_tree(
    tmp_path,
    {
      'latin.py': '# coding: latin-1\nx = "é"\n'.encode('latin-1'),
      'bom.py': b'\xef\xbb\xbfx = 1\r\n',
      'bad1.py': b'x = "\xff"\n',
      'bad2.py': b'# coding: no-such-codec\n',
      'bad3.py': b'# coding: rot13\n',
    },
  )
  (root / 'broken.py').symlink_to(root / 'nowhere')
  spec = make_spec('python_source', root)
  with caplog.at_level(logging.WARNING):
    documents = read(spec)
  assert documents['latin.py'][0] == '# coding: latin-1\nx = "é"\n'
  assert documents['bom.py'][0] == 'x = 1\r\n'
  assert len(documents) == 2
  assert 'skipped 4 ' in caplog.text and 'bad1.py' in caplog.text
  caplog.clear()
  assert len(list(sources.read(spec, quiet=True))) == 2
  assert not caplog.text


def test_python_source_defaults_to_the_standard_library(make_spec):
  documents = sources.read(make_spec('python_source'))
  first = [next(documents) for _ in range(30)]
  assert '__future__.py' in {document.name for document in first}


def test_python_source_missing_root(make_spec, tmp_path):
  with pytest.raises(errors.InputError, match=r"config\.data\.path='.*gone'.*correct it, or leave"):
    read(make_spec('python_source', tmp_path / 'gone'))


# text


def test_overlapping_roots_and_spellings_name_a_file_once(make_spec, tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'm.py').write_text('x = 1')
  spec = make_spec('python_source', f'{tmp_path},{tmp_path}/sub')
  assert [d.name for d in sources.read(spec)] == ['sub/m.py']
  spec = make_spec('text', f'{tmp_path}/sub/*.py,{tmp_path}/sub/../sub/m.py')
  assert len(list(sources.read(spec))) == 1


def test_one_long_text_file_becomes_several_documents(make_spec, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'TEXT_CUT_BYTES', 10)
  text = 'first line\nsecond\nthird line is long\nend'
  (tmp_path / 'book.txt').write_text(text)
  found = list(sources.read(make_spec('text', tmp_path / 'book.txt')))
  assert b''.join(d.text for d in found).decode() == text
  assert [d.name.rpartition('book.txt')[2] for d in found] == ['', '#1', '#2']
  assert found[1].text == b'second\nthird line is long\n'


def test_text_files_and_globs(make_spec, tmp_path, monkeypatch):
  write_tree(tmp_path, {'books/a.txt': 'A', 'books/old/b.txt': 'B', 'c.txt': 'é'})
  monkeypatch.chdir(tmp_path)
  assert read(make_spec('text', 'c.txt, books/**/*.txt')) == {
    'c.txt': ('é', 'c'),
    'a.txt': ('A', 'books'),
    'old/b.txt': ('B', 'old'),
  }
  absolute = read(make_spec('text', tmp_path / 'books' / '**' / '*.txt'))
  assert absolute == {'a.txt': ('A', 'books'), 'old/b.txt': ('B', 'old')}
  assert len(read(make_spec('text', 'c.txt,c.txt,*.txt'))) == 1


@pytest.mark.parametrize(
  'path, message',
  [
    ('gone.txt', r"config\.data\.path='gone.txt'.*'gone.txt' does not exist; name files"),
    ('*.md', r"config\.data\.path='\*\.md'.*matches none; correct it"),
    ('empty', r"the directory 'empty' must hold visible files"),
    ('x' * 400, 'does not exist; name files'),
    ('latin.txt', r"UTF-8 text, and 'latin.txt' does not.*iconv"),
  ],
)
@pytest.mark.parametrize('source', ['text'])
def test_text_bad_paths(make_spec, tmp_path, monkeypatch, source, path, message):
  write_tree(tmp_path, {'folder/a.txt': 'A', 'empty/.hidden': '', 'latin.txt': b'\xe9'})
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.InputError, match=message):
    read(make_spec(source, path))


# jsonl


def test_jsonl(make_spec, tmp_path):
  lines = [{'text': 'one', 'lang': 'en'}, {'text': '', 'lang': 'en'}, {'text': 'zwei', 'lang': 2}]
  file = tmp_path / 'd.jsonl'
  file.write_text('\n\n'.join(map(json.dumps, lines)))
  assert read(make_spec('jsonl', file)) == {'d.jsonl:1': ('one', 'd'), 'd.jsonl:5': ('zwei', 'd')}
  labelled = read(make_spec('jsonl', file, domain_field='lang'))
  assert [domain for _, domain in labelled.values()] == ['en', '2']


@pytest.mark.parametrize(
  'line, message',
  [
    (b'{"text": "a"', r'd\.jsonl:2 must be a JSON object.*repair or remove'),
    (b'{"text": "\xff"}', r'd\.jsonl:2 must be a JSON object'),
    (b'["text"]', r"config\.data\.text_field='text' .*d\.jsonl:2.*no fields at all"),
    (b'{"body": "a"}', r"config\.data\.text_field='text' .*d\.jsonl:2.*has 'body': set"),
    (b'{"text": null}', r"field 'text' of d\.jsonl:2 must be a string.*None"),
    (b'{"text": "\\ud800"}', r"field 'text' of d\.jsonl:2 must be a string"),
  ],
)
def test_jsonl_bad_line(make_spec, tmp_path, line, message):
  (tmp_path / 'd.jsonl').write_bytes(b'{"text": "fine"}\n' + line + b'\n')
  with pytest.raises(errors.InputError, match=message):
    read(make_spec('jsonl', tmp_path / 'd.jsonl'))


def test_jsonl_missing_domain_field(make_spec, tmp_path):
  (tmp_path / 'd.jsonl').write_text('{"text": "fine"}\n')
  with pytest.raises(errors.InputError, match=r"config\.data\.domain_field='lang'.*d\.jsonl:1"):
    read(make_spec('jsonl', tmp_path / 'd.jsonl', domain_field='lang'))


@pytest.mark.parametrize(
  'source, row', [('jsonl', '"text": "x"'), ('conversations', '"prompt": "x", "completion": "y"')]
)
def test_a_domain_is_unicode_text(make_spec, tmp_path, source, row):
  (tmp_path / 'd.jsonl').write_text(f'{{{row}, "lang": "\\ud83d"}}\n')
  message = r"field 'lang' of d\.jsonl:1 must be Unicode text, not '\\ud83d'; repair"
  with pytest.raises(errors.InputError, match=message):
    read(make_spec(source, tmp_path / 'd.jsonl', domain_field='lang'))


def test_some_conversation_must_have_the_domain_field(make_spec, tmp_path, monkeypatch):
  rows = [{'prompt': 'x', 'completion': 'y'}, {'prompt': 'x', 'completion': 'y', 'lang': 'en'}]
  file = tmp_path / 'd.jsonl'
  file.write_text('\n'.join(map(json.dumps, rows)))
  found = read(make_spec('conversations', file, domain_field='lang'))
  assert [domain for _, domain in found.values()] == ['d', 'en']
  message = r"domain_field='nope' is a field of no row .*d\.jsonl:1 has 'prompt', 'completion': set"
  with pytest.raises(errors.InputError, match=message):
    read(make_spec('conversations', file, domain_field='nope'))
  monkeypatch.setitem(sys.modules, 'datasets', fake_datasets([{**rows[0], 'image': 1}], []))
  with pytest.raises(errors.InputError, match=r"org/data:1 has .*, 'image': set"):
    read(make_spec('hf_conversations', 'org/data', domain_field='nope'))


# parquet


def test_parquet(make_spec, tmp_path):
  table = pyarrow.table({'text': ['a', 'é', ''], 'lang': ['x', 'y', 'z'], 'n': [1, 2, 3]})
  parquet.write_table(table, tmp_path / 'd.parquet')
  spec = make_spec('parquet', tmp_path / '*.parquet', domain_field='lang')
  assert read(spec) == {'d.parquet:0': ('a', 'x'), 'd.parquet:1': ('é', 'y')}
  with pytest.raises(errors.InputError, match=r"text_field='body'.*'text', 'lang', 'n': set"):
    read(make_spec('parquet', tmp_path / 'd.parquet', text_field='body'))
  with pytest.raises(errors.InputError, match=r"domain_field='topic'.*'text', 'lang', 'n': set"):
    read(make_spec('parquet', tmp_path / 'd.parquet', domain_field='topic'))


def test_parquet_that_pyarrow_cannot_read(make_spec, tmp_path, monkeypatch):
  parquet.write_table(pyarrow.table({'text': ['a']}), tmp_path / 'd.parquet')

  def iter_batches(self, **unused):
    raise pyarrow.ArrowNotImplementedError('unknown encoding')

  monkeypatch.setattr(parquet.ParquetFile, 'iter_batches', iter_batches)
  with pytest.raises(errors.InputError, match=r"cannot read '.*d\.parquet' \(unknown encoding\)"):
    read(make_spec('parquet', tmp_path / 'd.parquet'))


def test_parquet_unreadable_or_without_the_library(make_spec, tmp_path, monkeypatch):
  (tmp_path / 'd.parquet').write_bytes(b'not parquet')
  spec = make_spec('parquet', tmp_path / 'd.parquet')
  with pytest.raises(errors.InputError, match=r"config\.data\.path=.*cannot read '.*d\.parquet'"):
    read(spec)
  monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
  with pytest.raises(errors.InputError, match=r"config\.data\.source='parquet' needs.*'hf'.*pip"):
    read(spec)


# hf


def fake_datasets(rows, calls: list) -> types.SimpleNamespace:
  def load_dataset(path, *, split, streaming, **options):
    calls.append((path, split, streaming, *options.items()))
    if path != 'org/data':
      raise FileNotFoundError(f'no dataset {path}')
    return iter(rows)

  return types.SimpleNamespace(load_dataset=load_dataset)


def test_hugging_face_is_streamed_once(make_spec, monkeypatch):
  calls = []
  rows = [{'body': 'a\nb', 'lang': 'x'}, {'body': 'é', 'lang': 'y'}]
  monkeypatch.setitem(sys.modules, 'datasets', fake_datasets(rows, calls))
  spec = make_spec('hf', 'org/data', text_field='body', domain_field='lang')
  expected = {'org/data:1': ('a\nb', 'x'), 'org/data:2': ('é', 'y')}
  assert read(spec) == expected
  monkeypatch.setitem(sys.modules, 'datasets', None)
  assert read(spec) == expected
  assert calls == [('org/data', 'train', True)]


def test_conversations_and_preferences_of_hugging_face(make_spec, monkeypatch):
  asked = [{'role': 'user', 'content': 'q'}]
  chat = [*asked, {'role': 'assistant', 'content': 'a'}]
  rows = [{'messages': chat, 'lang': 'x', 'image': object()}, {'prompt': 'q', 'completion': 'b'}]
  calls = []
  monkeypatch.setitem(sys.modules, 'datasets', fake_datasets(rows, calls))
  spec = make_spec('hf_conversations', 'org/data?split=sft', domain_field='lang')
  found = list(sources.read(spec))
  assert [(d.name, d.domain) for d in found] == [
    ('org/data?split=sft:1', 'x'),
    ('org/data?split=sft:2', 'org/data?split=sft'),
  ]
  assert [conversations.answers(conversations.from_bytes(d.text)) for d in found] == ['a', 'b']
  assert list(sources.read(spec)) == found and len(calls) == 1
  rows[:] = [{'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}]
  (pair,) = sources.read(make_spec('hf_preferences', 'org/data?split=sft'))
  chosen, rejected = preferences.from_bytes(pair.text)
  assert (chosen[-1].content, rejected[-1].content) == ('a', 'b')
  rows[:] = [{'messages': chat}, {'text': 'x'}]
  with pytest.raises(errors.InputError, match=r"org/data:2 must have .*its fields: 'text'"):
    read(make_spec('hf_conversations', 'org/data'))
  rows[1] = {'messages': chat}  # nothing of the first attempt is kept
  assert len(read(make_spec('hf_conversations', 'org/data'))) == 2


def test_a_hugging_face_data_set_has_a_name_a_split_and_a_revision(make_spec, monkeypatch):
  calls, rows = [], [{'text': 'a'}]
  monkeypatch.setitem(sys.modules, 'datasets', fake_datasets(rows, calls))
  read(make_spec('hf', 'org/data?name=en&split=validation&revision=abc'))
  assert calls == [('org/data', 'validation', True, ('name', 'en'), ('revision', 'abc'))]
  for wrong in ('org/data?config=en', 'org/data?name=', 'org/data?'):
    with pytest.raises(errors.InputError, match='behind the question mark may stand name, split'):
      read(make_spec('hf', wrong))


def test_a_local_data_set_whose_files_have_changed_is_read_anew(make_spec, monkeypatch, tmp_path):
  write_tree(tmp_path, {'set/train.jsonl': 'x'})
  place, rows = str(tmp_path / 'set'), [{'text': 'a'}]

  def load_dataset(path, **unused):
    return iter(rows)

  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  spec = make_spec('hf', place)
  assert [text for text, _ in read(spec).values()] == ['a']
  rows[0] = {'text': 'b'}
  assert [text for text, _ in read(spec).values()] == ['a']
  write_tree(tmp_path, {'set/train.jsonl': 'longer'})
  assert [text for text, _ in read(spec).values()] == ['b']


def test_rows_of_null_text_are_refused_or_by_choice_left_out_and_counted(
  make_spec, tmp_path, caplog
):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
  parquet.write_table(pyarrow.table({'text': [None, 'a', None]}), tmp_path / 'a.parquet')
  for source, names in (('jsonl', ['a.jsonl:1', 'a.jsonl:3']), ('parquet', ['a.parquet:1'])):
    path = tmp_path / f'a.{source}'
    with pytest.raises(errors.InputError, match='config.data.skip_null_text=True'):
      read(make_spec(source, path))
    with caplog.at_level(logging.WARNING):
      assert list(read(make_spec(source, path, skip_null_text=True))) == names
  assert 'skipped 1 rows of a.jsonl' in caplog.text and 'skipped 2 rows of a.p' in caplog.text


def test_packed_files_read_as_what_is_in_them(make_spec, tmp_path, monkeypatch):
  lines = b'{"text": "a"}\n{"text": "b"}\n'
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
  (tmp_path / 't.txt.gz').write_bytes(gzip.compress(b'text'))
  packed = make_spec('jsonl', tmp_path / 'a.jsonl.gz')
  assert read(packed) == {'a.jsonl.gz:1': ('a', 'a'), 'a.jsonl.gz:2': ('b', 'a')}
  assert list(read(make_spec('text', tmp_path / 't.txt.gz')).values())[0][0] == 'text'
  whole = (tmp_path / 'a.jsonl.gz').read_bytes()
  for damaged in (whole[:-9], whole[:4], b'no gzip', whole[:15] + b'\xff' * 9 + whole[24:]):
    (tmp_path / 'a.jsonl.gz').write_bytes(damaged)
    with pytest.raises(errors.InputError, match=r'cannot read .*a\.jsonl\.gz'):
      read(packed)
  (tmp_path / 'a.jsonl.zst').write_bytes(b'x')
  opened = types.SimpleNamespace(open=lambda file, mode: io.BytesIO(lines))
  monkeypatch.setitem(sys.modules, 'compression.zstd', None)
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  with pytest.raises(errors.InputError, match="needs the package 'zstandard'"):
    read(make_spec('jsonl', tmp_path / 'a.jsonl.zst'))
  monkeypatch.setitem(sys.modules, 'zstandard', opened)
  assert len(read(make_spec('jsonl', tmp_path / 'a.jsonl.zst'))) == 2


def test_hugging_face_download_that_fails_leaves_nothing(make_spec, monkeypatch, tmp_path):
  rows = [{'text': 'a'}, {'body': 'b'}]
  monkeypatch.setitem(sys.modules, 'datasets', fake_datasets(rows, []))
  with pytest.raises(errors.InputError, match=r"text_field='text'.*org/data:2.*'body'"):
    read(make_spec('hf', 'org/data'))
  assert not [p for p in tmp_path.rglob('*') if p.is_file()]
  with pytest.raises(errors.InputError, match=r"config\.data\.path='org/gone'.*no dataset.*local"):
    read(make_spec('hf', 'org/gone'))


def test_a_row_of_hugging_face_that_cannot_be_read(make_spec, monkeypatch, tmp_path):
  def rows():
    yield {'text': 'a'}
    raise pyarrow.ArrowException('JSON parse error')

  monkeypatch.setitem(sys.modules, 'datasets', fake_datasets(rows(), []))
  with pytest.raises(errors.InputError, match=r'the row behind 1 cannot be read \(JSON parse'):
    read(make_spec('hf', 'org/data'))
  assert not [p for p in tmp_path.rglob('*') if p.is_file()]

  def load_dataset(*unused, **options):
    raise RuntimeError('Dataset scripts are no longer supported')

  monkeypatch.setattr(sys.modules['datasets'], 'load_dataset', load_dataset)
  with pytest.raises(errors.InputError, match=r'must name a Hugging Face dataset .*no longer'):
    read(make_spec('hf', 'org/data'))


def test_hugging_face_without_the_library(make_spec, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(errors.InputError, match=r"'datasets'; install the extra 'hf'"):
    read(make_spec('hf', 'org/data'))


# synthetic


def test_synthetic(make_spec):
  documents = list(sources.read(make_spec('synthetic', synthetic_documents=8)))
  assert [d.name for d in documents] == [f'synthetic/{i}' for i in range(8)]
  assert len({d.domain for d in documents}) == 4
  chosen = list(sources.read(make_spec('synthetic', 'code,arithmetic', synthetic_documents=8)))
  assert chosen == [d for d in documents if d.domain in ('code', 'arithmetic')]
  with pytest.raises(errors.InputError, match="it has 'cod'; did you mean 'code'"):
    read(make_spec('synthetic', 'cod'))


# the split


def test_split_has_the_asked_size_and_grows_with_the_fraction():
  names = [f'pkg/file{i}.py' for i in range(4000)]
  small = {n for n in names if sources.is_heldout(n, 0.1)}
  large = {n for n in names if sources.is_heldout(n, 0.2)}
  # Binomial(4000, 0.1) has standard deviation 19.
  assert 320 < len(small) < 480
  assert small < large
