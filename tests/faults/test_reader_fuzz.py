"""Mutated files: every reader returns something whole, or refuses in one line, in bounded time.

A mutant is drawn from its number, so a failure names what repeats it. The default suite tries a few
of each kind; `-m slow` tries hundreds and prints the counts.
"""

import collections
import json
import random
import resource
import time

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import parse, paths
from moe_jax.data import kept_files, sources, tokenizer_probe
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.interop import safetensors_files, source
from moe_jax.models.routers import tables
from tests import tiny
from tests.faults import mutants
from tests.interop import checkpoints
from tests.models.routers import test_tables

FEW, MANY = 12, 250
SECONDS, BYTES = 5.0, 2**29  # for one file; growth of the process over all of them


class Jsonl:
  """Text with a domain, a line each."""

  def write(self, path, rng):
    rows = [{'text': f'document {i}', 'domain': 'a', 'n': [i]} for i in range(5)]
    lines = [json.dumps(row).encode() for row in rows]
    lines[rng.randrange(5)] = mutants.json_text(rng, rows[0])
    (path / 'a.jsonl').write_bytes(b'\n'.join(lines))

  def read(self, path):
    spec = sources.Spec(
      *('config.data', 'jsonl', str(path / 'a.jsonl'), 'text', 'domain', 0),
      cache_dir=paths.cache_root(str(path)),
      progress=False,
    )
    for document in sources.read(spec):
      document.text.decode('utf-8')


class Config:
  """config.json of a checkpoint, against its tensors."""

  def __init__(self, root, monkeypatch):
    self.hf = checkpoints.config('deepseek_v3')
    self.root = checkpoints.write(root / 'in', self.hf, checkpoints.tensors(self.hf))
    # The shapes of all tensors have been compared when the leaves are asked for, which takes long.
    monkeypatch.setattr(source, 'abstract_leaves', lambda model: {})
    monkeypatch.setattr(source.mapping, 'check_covers', lambda *unused: None)

  def write(self, path, rng):
    (self.root / 'config.json').write_bytes(mutants.json_text(rng, self.hf))

  def read(self, path):
    cfg = source.read(self.root, tiny.values()).cfg
    assert parse.from_dict(parse.to_dict(cfg)) == cfg


class EndTokens:
  """generation_config.json and tokenizer_config.json."""

  def __init__(self):
    self.tokenizer = tokenizer_lib.byte_tokenizer('<s>', '</s>')

  def write(self, path, rng):
    settings = {'eos_token_id': [1, 2], 'bos_token_id': 0, 'temperature': 0.3}
    (path / 'generation_config.json').write_bytes(mutants.json_text(rng, settings))
    named = {'eos_token': {'content': '</s>'}, 'bos_token': '<s>'}
    (path / 'tokenizer_config.json').write_bytes(mutants.json_text(rng, named))

  def read(self, path):
    ids = kept_files.end_ids(path, self.tokenizer)
    assert ids[0] == self.tokenizer.eos_id and all(type(i) is int and i >= 0 for i in ids)


class Safetensors:
  """A file of tensors: header, its length, data."""

  def __init__(self, root):
    weights = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.ones(4, np.int8)}
    checkpoints.write_file(root / 'whole', weights)
    self.data = (root / 'whole').read_bytes()

  def write(self, path, rng):
    (path / 'model.safetensors').write_bytes(mutants.safetensors(rng, self.data))

  def read(self, path):
    found = safetensors_files.find(path)
    with safetensors_files.Reader(found) as reader:
      for name, tensor in found.items():
        assert reader.read(name, 0, tensor.shape).shape == tensor.shape


class Index:
  """model.safetensors.index.json."""

  def __init__(self, root):
    checkpoints.write_file(root / 'one', {'a': np.ones(3, np.float32)})
    self.data = (root / 'one').read_bytes()

  def write(self, path, rng):
    (path / 'x.safetensors').write_bytes(self.data)
    index = {'metadata': {'total_size': 12}, 'weight_map': {'a': 'x.safetensors'}}
    (path / safetensors_files.INDEX).write_bytes(mutants.json_text(rng, index))

  def read(self, path):
    assert list(safetensors_files.find(path)) == ['a']


class Replay:
  """Recorded assignments, .npz."""

  def write(self, path, rng):
    (path / 'a.npz').write_bytes(mutants.npz(rng, 'expert_idx', test_tables.recorded()))

  def read(self, path):
    options = {'options__replay_path': str(path / 'a.npz'), 'options__replay_rows': 3}
    cfg = test_tables.make(4, 2, router='replay', **options)
    found = tables.load_assignments(cfg, (2, 3, 4, 2))
    assert found.dtype == np.int32 and found.shape == (2, 3, 4, 2)


class Tokenizer:
  """tokenizer.json; panics of native code are what `tokenizer_probe.run` has a process for."""

  def __init__(self):
    texts = ['the cat sat on the mat, f(x) = 12\n' * 9]
    self.content = json.loads(tokenizer_lib.train_bpe(texts, 290, '<s>', '</s>').to_json())

  def write(self, path, rng):
    content = self.content
    if rng.random() < 0.7:  # most of the file is its vocabulary
      names = [name for name in content if name not in ('model', 'added_tokens')]
      small = {name: content[name] for name in names}
      content = content | mutants.json_value(rng, small)
      text = json.dumps(content).encode()
    else:
      text = mutants.json_text(rng, content)
    (path / 'tokenizer.json').write_bytes(text)

  def read(self, path):
    tokenizer = tokenizer_lib.load(path / 'tokenizer.json', '<s>', '</s>')
    words = tokenizer_probe.WORDS
    assert tokenizer.decode(tokenizer.encode(words)).split() == words.split()


KINDS = {
  'jsonl': lambda root, patch: Jsonl(),
  'config': Config,
  'end tokens': lambda root, patch: EndTokens(),
  'safetensors': lambda root, patch: Safetensors(root),
  'index': lambda root, patch: Index(root),
  'replay': lambda root, patch: Replay(),
  'tokenizer': lambda root, patch: Tokenizer(),
}


def outcome(kind, path, number: int) -> str:
  """'read' or 'refused'; any other end, and a slow one, is a failure."""
  kind.write(path, random.Random(number))
  start = time.monotonic()
  try:
    kind.read(path)
    found = 'read'
  except errors.InputError as e:
    assert '\n' not in str(e), (number, e)
    found = 'refused'
  except BaseException as e:
    raise AssertionError(f'mutant {number}: {type(e).__name__}: {e}') from e
  assert time.monotonic() - start < SECONDS, number
  return found


def try_many(name, tmp_path, monkeypatch, numbers) -> collections.Counter:
  (tmp_path / 'whole').mkdir(), (tmp_path / 'mutants').mkdir()
  kind = KINDS[name](tmp_path / 'whole', monkeypatch)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  counts = collections.Counter(outcome(kind, tmp_path / 'mutants', i) for i in numbers)
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
  return counts


@pytest.mark.parametrize('name', KINDS)
def test_a_few_mutants(name, tmp_path, monkeypatch):
  if name == 'tokenizer':  # a process each is for the long form
    monkeypatch.setattr(tokenizer_probe, 'run', tokenizer_probe.try_out)
  counts = try_many(name, tmp_path, monkeypatch, range(FEW))
  assert counts['refused'] > 0 and counts.total() == FEW


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_many_mutants(name, tmp_path, monkeypatch):
  counts = try_many(name, tmp_path, monkeypatch, range(1000, 1000 + MANY))
  print(f'{name}: {dict(counts)}')
  assert counts['refused'] > MANY // 5 and counts['read'] > 0
