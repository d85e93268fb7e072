"""A cached corpus is trusted by the hash of every file: damage is noticed, said and mended."""

import logging
import os

import numpy as np
import pytest

from moe_jax.data import corpus as corpus_lib
from tests import tiny


@pytest.fixture
def data(tmp_path):
  return tiny.make(
    data__source='synthetic',
    data__synthetic_documents=60,
    data__tokenizer='bytes',
    data__cache_dir=str(tmp_path / 'cache'),
  ).data


def load(data):
  return corpus_lib.load_corpus(data, 300, 0, progress=False)


def content(corpus):
  splits = (*corpus.train, corpus.heldout)
  return [np.asarray(a).tolist() for s in splits for a in (s.tokens, s.offsets, s.doc_bytes)]


def test_a_flipped_byte_in_any_file_is_noticed(data, caplog):
  """Both ends and the middle of each file: sizes stay what they were."""
  corpus = load(data)
  (directory,) = corpus.directories
  expected, tried = content(corpus), 0
  for name in sorted(os.listdir(directory)):
    size = (directory / name).stat().st_size
    for place in sorted({0, size // 2, size - 1}):
      whole = (directory / name).read_bytes()
      damaged = bytearray(whole)
      damaged[place] ^= 0x10
      (directory / name).write_bytes(damaged)
      caplog.clear()
      with caplog.at_level(logging.WARNING):
        again = load(data)
      assert 'is damaged' in caplog.text and 'tokenising anew' in caplog.text, (name, place)
      assert content(again) == expected
      assert (directory / name).read_bytes() == whole
      tried += 1
  assert tried >= 20


def test_a_whole_cache_is_used_in_silence(data, caplog, monkeypatch):
  load(data)

  def fail(*unused, **also_unused):
    raise AssertionError('tokenised again')

  monkeypatch.setattr(corpus_lib, '_build', fail)
  with caplog.at_level(logging.WARNING):
    load(data)
  assert 'damaged' not in caplog.text
