import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import hashing, sources
from moe_jax.data import tokenizer as tokenizer_lib

VOCAB = 300


def load(data: schema.DataConfig, vocab_size: int = VOCAB, seed: int = 0) -> corpus_lib.Corpus:
  return corpus_lib.load_corpus(data, vocab_size, seed, progress=False)


def documents(split: corpus_lib.TokenSplit) -> list[list[int]]:
  return [
    split.tokens[a:b].tolist() for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)
  ]


def texts(corpus: corpus_lib.Corpus, split: corpus_lib.TokenSplit) -> list[bytes]:
  return [corpus.tokenizer.decode(ids).encode('utf-8') for ids in documents(split)]


def by_split(data: schema.DataConfig) -> tuple[list[sources.Document], list[sources.Document]]:
  """The source's documents: train, held out."""
  result = ([], [])
  for document in sources.read(sources.specs(data)['']):
    result[sources.is_heldout(document.name, data.heldout_fraction)].append(document)
  return result


@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe'])
def test_documents_come_back_whole(make_config, tokenizer):
  data = make_config(tokenizer=tokenizer)
  corpus = load(data)
  (train,) = corpus.train
  for split, expected in zip((train, corpus.heldout), by_split(data)):
    assert texts(corpus, split) == [document.text for document in expected]
    assert split.doc_bytes.tolist() == [len(document.text) for document in expected]
    labels = [corpus.domains[i] for i in split.doc_domain]
    assert labels == [document.domain for document in expected]
    assert split.num_bytes == sum(len(document.text) for document in expected)
    assert split.num_documents == len(expected) and split.num_tokens == len(split.tokens)
    assert isinstance(split.tokens, np.memmap) and split.tokens.dtype == np.uint16
    for ids in documents(split):
      assert ids[0] == corpus.tokenizer.bos_id and ids[-1] == corpus.tokenizer.eos_id
      assert not {corpus.tokenizer.bos_id, corpus.tokenizer.eos_id} & set(ids[1:-1])
  assert corpus.heldout_bytes() == b''.join(d.text for d in by_split(data)[1])
  assert corpus.domains == ('arithmetic', 'brackets', 'code', 'grammar')
  assert corpus.weights == (1.0,)


def test_bpe_sees_only_the_training_split(make_config, monkeypatch):
  seen = []
  train_bpe = tokenizer_lib.train_bpe

  def spy(texts, *args, **kwargs):
    seen.extend(texts)
    return train_bpe(seen, *args, **kwargs)

  monkeypatch.setattr(tokenizer_lib, 'train_bpe', spy)
  data = make_config(tokenizer='bpe')
  load(data)
  train, heldout = by_split(data)
  assert seen == [document.text.decode('utf-8') for document in train]
  assert not set(seen) & {document.text.decode('utf-8') for document in heldout}


def test_a_second_load_reads_the_cache(make_config, monkeypatch):
  data = make_config(tokenizer='bpe')
  first = load(data)

  def fail(*args, **kwargs):
    raise AssertionError('worked again')

  monkeypatch.setattr(tokenizer_lib.Tokenizer, 'encode_batch', fail)
  monkeypatch.setattr(tokenizer_lib, 'train_bpe', fail)
  second = load(data)
  assert second.fingerprint == first.fingerprint
  assert (second.train[0].tokens == first.train[0].tokens).all()
  assert second.tokenizer.to_json() == first.tokenizer.to_json()


def python_tree(root: pathlib.Path) -> pathlib.Path:
  for i in range(40):
    file = root / f'pkg{i % 3}' / f'm{i}.py'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'x = {i}\n' * (i + 1))
  return root


def test_neither_split_nor_fingerprint_depend_on_where_the_root_lies(make_config, tmp_path):
  root = python_tree(tmp_path / 'a')
  moved = shutil.copytree(root, tmp_path / 'b' / 'c')
  here = load(make_config(source='python_source', path=str(root)))
  there = load(make_config(source='python_source', path=str(moved), cache_dir=str(tmp_path / 'k')))
  assert here.fingerprint == there.fingerprint
  assert documents(here.heldout) == documents(there.heldout)


def test_new_files_never_move_old_ones_between_splits(make_config, tmp_path):
  data = make_config(source='python_source', path=str(python_tree(tmp_path / 'a')))
  before = [{d.name for d in split} for split in by_split(data)]
  for i in range(40, 60):
    (tmp_path / 'a' / f'new{i}.py').write_text('y = 1\n')
  after = [{d.name for d in split} for split in by_split(data)]
  assert before[0] < after[0] and before[1] <= after[1]
  assert not after[0] & after[1]


def test_fingerprint_changes_with_whatever_decides_the_tokens(make_config, tmp_path):
  base = {'source': 'python_source', 'path': str(python_tree(tmp_path / 'a'))}
  prints = [load(make_config(**base)).fingerprint]
  assert load(make_config(**base), seed=5).fingerprint == prints[0]
  prints.append(load(make_config(**base, heldout_fraction=0.4)).fingerprint)
  prints.append(load(make_config(**base, tokenizer='bpe')).fingerprint)
  prints.append(load(make_config(**base, tokenizer='bpe'), vocab_size=261).fingerprint)
  prints.append(load(make_config(**base, fim_rate=0.5)).fingerprint)
  prints.append(load(make_config(**base, fim_rate=0.5), seed=5).fingerprint)
  (tmp_path / 'a' / 'pkg0' / 'm0.py').write_text('x = 1\n')
  prints.append(load(make_config(**base)).fingerprint)
  (tmp_path / 'a' / 'pkg0' / 'm0.py').rename(tmp_path / 'a' / 'pkg0' / 'z.py')
  prints.append(load(make_config(**base)).fingerprint)
  assert len(set(prints)) == len(prints)


def test_fim_rearranges_training_documents_only(make_config):
  plain = load(make_config())
  corpus = load(make_config(fim_rate=0.5))
  assert documents(corpus.heldout) == documents(plain.heldout)
  changed = 0
  for before, after in zip(documents(plain.train[0]), documents(corpus.train[0])):
    assert sorted(before) == sorted(i for i in after if i not in corpus.tokenizer.fim_ids)
    changed += before != after
  assert 0.2 < changed / plain.train[0].num_documents < 0.8
  assert corpus.train[0].num_bytes == plain.train[0].num_bytes


def test_fim_of_a_document_does_not_depend_on_the_others(make_config):
  few = documents(load(make_config(fim_rate=0.5, synthetic_documents=30)).train[0])
  many = documents(load(make_config(fim_rate=0.5)).train[0])
  assert many[: len(few)] == few


def mixture(tmp_path, weight: float = 3.0) -> dict[str, schema.MixtureComponent]:
  return {
    'words': schema.MixtureComponent('synthetic', '', 1.0),
    'code': schema.MixtureComponent('python_source', str(python_tree(tmp_path / 'a')), weight),
  }


def test_mixture(make_config, tmp_path):
  data = make_config(source='mixture', mixture=mixture(tmp_path), tokenizer='bpe')
  corpus = load(data)
  assert corpus.domains == ('code', 'words')
  assert corpus.weights == (0.75, 0.25)
  for i, split in enumerate(corpus.train):
    assert set(split.doc_domain) == {i}
  code = load(make_config(source='python_source', path=str(tmp_path / 'a')))
  words = load(make_config())
  assert texts(corpus, corpus.train[0]) == texts(code, code.train[0])
  assert texts(corpus, corpus.train[1]) == texts(words, words.train[0])
  assert texts(corpus, corpus.heldout) == texts(code, code.heldout) + texts(words, words.heldout)
  count = code.heldout.num_documents
  assert corpus.heldout.doc_domain.tolist() == [0] * count + [1] * words.heldout.num_documents
  assert corpus.heldout.num_bytes == len(corpus.heldout_bytes())
  assert corpus.heldout_bytes() == code.heldout_bytes() + words.heldout_bytes()


def test_another_end_token_of_one_tokenizer_is_another_corpus(make_config, tmp_path):
  """Both are special tokens of the file, which is the same for either choice."""
  inner = tokenizer_lib.byte_tokenizer('<s>', '</s>')._inner
  inner.add_special_tokens(['<turn>'])
  path = tmp_path / 'tokenizer.json'
  path.write_text(inner.to_str())
  found = [
    load(make_config(tokenizer=str(path), bos_token='<s>', eos_token=end))
    for end in ('</s>', '<turn>')
  ]
  for corpus, end in zip(found, ('</s>', '<turn>')):
    last = corpus.train[0].tokens[corpus.train[0].offsets[1:] - 1]
    assert set(last.tolist()) == {corpus.tokenizer.eos_id} == {inner.token_to_id(end)}
  assert found[0].fingerprint != found[1].fingerprint


def test_files_that_two_members_name_otherwise_are_warned_of(make_config, tmp_path, caplog):
  """A name decides what is held out: a.md and sub/a.md are one file and two decisions."""
  (tmp_path / 'sub').mkdir()
  for i in range(40):
    (tmp_path / 'sub' / f'{i}.md').write_text(f'text {i}')
  (tmp_path / 'own.md').write_text('of one member')

  def warnings(**paths):
    caplog.clear()
    parts = {label: schema.MixtureComponent('text', path, 1.0) for label, path in paths.items()}
    load(make_config(source='mixture', mixture=parts))
    return [r.getMessage() for r in caplog.records if 'different names' in r.getMessage()]

  whole, part = str(tmp_path / '**/*.md'), str(tmp_path / 'sub/*.md')
  (line,) = warnings(all=whole, again=part)
  assert 'mixture.again and .all both have 40 files' in line and 'share no file' in line
  assert not warnings(all=whole, again=whole)  # the same names, and the same split
  assert not warnings(part=part, own=str(tmp_path / 'sub/1*.md'))


def test_new_weights_tokenise_nothing_but_change_the_fingerprint(
  make_config, tmp_path, monkeypatch
):
  before = load(make_config(source='mixture', mixture=mixture(tmp_path)))
  monkeypatch.setattr(tokenizer_lib.Tokenizer, 'encode_batch', None)
  after = load(make_config(source='mixture', mixture=mixture(tmp_path, 1.0)))
  assert after.directories == before.directories
  assert after.fingerprint != before.fingerprint


def big_tokenizer(path: pathlib.Path) -> str:
  vocab = json.loads(tokenizer_lib.byte_tokenizer('<s>', '</s>').to_json())['model']['vocab']
  vocab |= {f'filler{i}': len(vocab) + i for i in range(2**16)}
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.save(str(path))
  return str(path)


def test_an_existing_tokenizer_with_a_large_vocabulary(make_config, tmp_path):
  path = big_tokenizer(tmp_path / 'big.json')
  names = {'tokenizer': path, 'bos_token': '<s>', 'eos_token': '</s>'}
  corpus = load(make_config(**names), vocab_size=70_000)
  assert corpus.train[0].tokens.dtype == np.uint32
  with pytest.raises(errors.InputError, match=r'config\.model\.vocab_size=300 .*at least 65797'):
    load(make_config(**names))
  with pytest.raises(errors.InputError, match=r"config\.data\.bos_token='<｜begin"):
    load(make_config(tokenizer=path), vocab_size=70_000)


def test_damaged_and_half_written_directories_are_not_used(make_config):
  corpus = load(make_config())
  (directory,) = corpus.directories
  expected = documents(corpus.train[0])
  # What a killed process leaves behind, and what a full disk does.
  shutil.copytree(directory, directory.parent / f'.{directory.name}.0123')
  for name in ('train.tokens', 'meta.json'):
    os.truncate(directory / name, 7)
    again = load(make_config())
    assert documents(again.train[0]) == expected
    assert again.directories == (directory,)


def test_small_batches_and_long_documents_give_the_same_tokens(make_config, monkeypatch, tmp_path):
  expected = documents(load(make_config()).train[0])
  monkeypatch.setattr(corpus_lib, '_BATCH_BYTES', 1)
  other = load(make_config(cache_dir=str(tmp_path / 'other')))
  assert documents(other.train[0]) == expected


SCRIPT = """
import json, sys
from configs import base
from moe_jax.config import schema
from moe_jax.data import corpus, hashing
data = schema.DataConfig(**base.get_config().data.to_dict() | json.loads(sys.argv[1]))
loaded = corpus.load_corpus(data, 300, 0)
print(loaded.fingerprint, hashing.hexdigest(loaded.train[0].tokens.tobytes()))
"""


def test_processes_agree_and_may_build_at_once(make_config, tmp_path):
  data = make_config(tokenizer='bpe', fim_rate=0.5)
  overrides = {
    k: getattr(data, k)
    for k in ('source', 'synthetic_documents', 'heldout_fraction', 'tokenizer', 'fim_rate')
  }
  overrides['cache_dir'] = str(tmp_path / 'shared')
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', SCRIPT, json.dumps(overrides)],
      env=os.environ | {'PYTHONHASHSEED': str(seed)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for seed in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  here = load(data)
  expected = [here.fingerprint, hashing.hexdigest(here.train[0].tokens.tobytes())]
  assert [out.split() for out, _ in outputs] == [expected, expected]
  # Without a terminal there are no bars, and nothing else is said.
  assert [err for _, err in outputs] == ['', '']
  assert len(list((tmp_path / 'shared' / 'corpora').iterdir())) == 1


def test_progress_goes_to_stderr(make_config, capsys):
  corpus_lib.load_corpus(make_config(tokenizer='bpe'), VOCAB, 0, progress=True)
  assert not capsys.readouterr().out


# Bad input


def test_unwritable_cache(make_config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.InputError, match=r'config\.data\.cache_dir: .*file.*MOE_JAX_CACHE'):
    load(make_config(cache_dir=str(tmp_path / 'file')))


def test_a_split_without_documents(make_config):
  with pytest.raises(
    errors.InputError, match=r'heldout_fraction=1e-09 .*heldout split.*60; raise it, or give more'
  ):
    load(make_config(heldout_fraction=1e-9))
  with pytest.raises(errors.InputError, match=r'heldout_fraction=0\.999999.*train split.*lower it'):
    load(make_config(heldout_fraction=0.999999))
  with pytest.raises(errors.InputError, match='split of .*, which has 1; give more documents'):
    load(make_config(synthetic_documents=1))


def test_an_empty_corpus(make_config, tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  path = str(tmp_path / 'empty.txt')
  with pytest.raises(
    errors.InputError, match=r"config\.data\.path='.*empty\.txt'.*holds none; name"
  ):
    load(make_config(source='text', path=path))
  parts = {'bad': schema.MixtureComponent('text', path, 1.0)}
  with pytest.raises(errors.InputError, match=r'config\.data\.mixture\.bad\.path=.*holds none'):
    load(make_config(source='mixture', mixture=parts))


def test_fim_without_its_tokens(make_config, tmp_path):
  path = big_tokenizer(tmp_path / 'big.json')
  inner = tokenizers.Tokenizer.from_file(path)
  text = inner.to_str()
  for token in tokenizer_lib.FIM_TOKENS:
    text = text.replace(token, f'no {token[2:-2]}')
  pathlib.Path(path).write_text(text)
  names = {'tokenizer': path, 'bos_token': '<s>', 'eos_token': '</s>'}
  with pytest.raises(errors.InputError, match=r'config\.data\.fim_rate=0\.5 needs'):
    load(make_config(**names, fim_rate=0.5), vocab_size=70_000)


def test_text_that_changes_while_it_is_read(make_config, monkeypatch):
  read = sources.read

  def changing(spec, *, quiet=False):
    for i, document in enumerate(read(spec, quiet=quiet)):
      if not (quiet and i == 3):
        yield document

  monkeypatch.setattr(sources, 'read', changing)
  with pytest.raises(errors.InputError, match=r'config\.data\.path=.*changed while.*run again'):
    load(make_config())
