import numpy as np
import pytest

from moe_jax.data import corpus as corpus_lib
from moe_jax.training import evaluate, evaluate_domains


@pytest.fixture
def split() -> corpus_lib.TokenSplit:
  return corpus_lib.TokenSplit(
    tokens=np.arange(10, dtype=np.uint16),
    offsets=np.array([0, 3, 4, 10]),
    doc_bytes=np.array([30, 10, 60]),
    doc_domain=np.array([2, 0, 2], np.int32),
    learned=np.arange(10, dtype=np.uint8) % 2,
  )


def test_a_subset_is_its_documents(split):
  found = evaluate_domains.subset(split, np.array([0, 2]))
  assert found.tokens.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
  assert found.offsets.tolist() == [0, 3, 9] and found.doc_bytes.tolist() == [30, 60]
  assert found.learned.tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 1]
  assert found.doc_domain.tolist() == [2, 2] and found.num_bytes == 90


def test_every_domain_with_text_is_measured_on_its_own(split, monkeypatch):
  corpus = corpus_lib.Corpus(None, (), (), split, ('a', 'b', 'c'), '', ())
  monkeypatch.setattr(evaluate, 'evaluate', lambda cfg, variables, one, mesh: one.heldout)
  found = dict(evaluate_domains.by_domain(None, None, corpus, None))
  assert {label: one.doc_bytes.tolist() for label, one in found.items()} == {
    'a': [10],
    'c': [30, 60],
  }
