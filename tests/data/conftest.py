"""Small configurations and corpora for the tests of the data room."""

import numpy as np
import pytest

from configs import base
from moe_jax.config import schema
from moe_jax.data import chat_template, corpus, sources, template_worker


@pytest.fixture
def make_config(tmp_path):
  """A function that builds a `DataConfig`: 60 synthetic documents as bytes, with any overrides."""

  def make(**overrides) -> schema.DataConfig:
    values = base.get_config().data.to_dict() | {
      'source': 'synthetic',
      'synthetic_documents': 60,
      'heldout_fraction': 0.2,
      'tokenizer': 'bytes',
      'cache_dir': str(tmp_path / 'cache'),
    }
    return schema.DataConfig(**values | overrides)

  return make


@pytest.fixture
def make_spec(make_config):
  """A function that builds the `Spec` of one source."""

  def make(source: str, path: str = '', **overrides) -> sources.Spec:
    return sources.specs(make_config(source=source, path=str(path), **overrides))['']

  return make


@pytest.fixture
def make_split():
  """A function that builds a `TokenSplit` whose tokens are all different: first, first + 1, ..."""

  def make(lengths, first: int = 0, domain: int = 0) -> corpus.TokenSplit:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return corpus.TokenSplit(
      tokens=np.arange(first, first + offsets[-1]).astype(np.uint16),
      offsets=offsets,
      doc_bytes=np.asarray(lengths, np.int64),
      doc_domain=np.full(len(lengths), domain, np.int32),
    )

  return make


@pytest.fixture
def make_corpus():
  """A function that wraps training splits into a `Corpus` that has no text behind it."""

  def make(*train: corpus.TokenSplit, weights=(1.0,)) -> corpus.Corpus:
    return corpus.Corpus(
      tokenizer=None,
      train=train,
      weights=tuple(w / sum(weights) for w in weights),
      heldout=train[0],
      domains=tuple(f'part{i}' for i in range(len(train))),
      fingerprint='',
      directories=(),
    )

  return make


@pytest.fixture
def in_process(monkeypatch):
  """Templates are rendered without a process, which takes a tenth of a second to start."""

  def ask(request):
    return template_worker.answer(request, lambda: None)

  monkeypatch.setattr(chat_template, '_ask', ask)
