import dataclasses

import numpy as np
import pytest

from moe_jax.data import corpus as corpus_lib
from moe_jax.training import evaluate, evaluate_domains
from tests import tiny


@pytest.fixture
def split() -> corpus_lib.TokenSplit:
  return corpus_lib.TokenSplit(
    tokens=np.arange(10, dtype=np.uint16),
    offsets=np.array([0, 3, 4, 10]),
    doc_bytes=np.array([30, 10, 60]),
    doc_domain=np.array([2, 0, 2], np.int32),
    learned=np.arange(10, dtype=np.uint8) % 2,
    doc_chosen=np.array([1, 0, 4]),
    reference=np.array([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], np.float32),
  )


def test_a_subset_is_its_documents(split):
  found = evaluate_domains.subset(split, np.array([0, 2]))
  assert found.tokens.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
  assert found.offsets.tolist() == [0, 3, 9] and found.doc_bytes.tolist() == [30, 60]
  assert found.learned.tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 1]
  assert found.doc_domain.tolist() == [2, 2] and found.num_bytes == 90
  assert found.doc_chosen.tolist() == [1, 4]
  assert found.reference.tolist() == [[-1, -2], [-5, -6]]


def test_all_documents_are_the_split_itself(split):
  found = evaluate_domains.subset(split, np.arange(3))
  for field in dataclasses.fields(split):
    np.testing.assert_array_equal(
      getattr(found, field.name), getattr(split, field.name), err_msg=field.name
    )


def test_what_is_not_known_of_text_stays_unknown(split):
  text = dataclasses.replace(split, learned=None, doc_chosen=None, reference=None)
  found = evaluate_domains.subset(text, np.array([1]))
  assert found.tokens.tolist() == [3]
  assert found.learned is found.doc_chosen is found.reference is None


@pytest.mark.parametrize('answer', [10, 0])
def test_every_domain_with_something_to_predict_is_measured(split, monkeypatch, answer):
  split = dataclasses.replace(
    split,
    offsets=np.array([0, 3, 5, 10]),
    doc_bytes=np.array([30, answer, 60]),
    doc_chosen=None,
    reference=None,
  )
  corpus = corpus_lib.Corpus(None, (), (), split, ('a', 'b', 'c'), '', ())
  monkeypatch.setattr(evaluate, 'evaluate', lambda cfg, variables, one, mesh: one.heldout)
  found = evaluate_domains.by_domain(tiny.make(), None, corpus, None)
  assert {label: one.doc_bytes.tolist() for label, one in found} == (
    ({'a': [10]} if answer else {}) | {'c': [30, 60]}
  )
