"""What a repetition saves: against logits computed whole, and which text is taken."""

import dataclasses

import numpy as np
import pytest
from scipy import special

from moe_jax.analysis import copying
from moe_jax.data import corpus as corpus_lib
from moe_jax.models import transformer
from tests import tiny
from tests.analysis import subjects


@pytest.fixture(scope='module')
def subject():
  return subjects.subject_of()


@pytest.mark.parametrize('num_rows', [1, 3, 7])
def test_against_the_logits_of_each_row(subject, num_rows):
  cfg = subject.cfg.model
  half = cfg.max_seq_len // 2
  chosen = copying.pieces(subject.corpus.heldout, half, num_rows)
  assert chosen.shape == (num_rows, half)
  ids = np.concatenate([chosen, chosen], axis=1)
  places = np.broadcast_to(np.arange(2 * half), ids.shape)
  out = transformer.apply(cfg, subject.variables, ids, places, np.ones_like(ids))
  logits = np.asarray(out.normed @ transformer.head_of(cfg, subject.variables['params']))
  said = special.log_softmax(logits.astype(np.float64), axis=-1)
  # [rows, half - 1]: every token of a piece but its first.
  first, second = (
    np.take_along_axis(said[:, at : at + half - 1], chosen[:, 1:, None], axis=-1)
    for at in (0, half)
  )
  found = copying.measure(subject, num_rows)
  assert found.first == pytest.approx(-first.mean(), rel=1e-5)
  assert found.second == pytest.approx(-second.mean(), rel=1e-5)
  assert found.saved == found.first - found.second != 0


def test_devices_and_rows_of_a_batch_change_nothing(subject):
  want = copying.measure(subject, 5)
  more = dataclasses.replace(subject.cfg.train, batch_size=3, micro_batch_size=0)
  parted = subject._replace(
    cfg=dataclasses.replace(subject.cfg, train=more), mesh=tiny.mesh(data=2)
  )
  assert copying.measure(parted, 5) == pytest.approx(want, rel=1e-5)


def split(*documents):
  tokens = np.concatenate([np.asarray(d, np.uint16) for d in documents])
  offsets = np.cumsum([0, *map(len, documents)])
  return corpus_lib.TokenSplit(tokens, offsets, np.ones(len(documents)), np.zeros(len(documents)))


def test_pieces_lie_within_documents_without_their_ends():
  text = split([0, 5, 6, 7, 8, 1], [0, 9, 1], [0, 2, 3, 4, 1])
  # Four tokens between the ends of the first document, one of the second, three of the third.
  assert copying.pieces(text, 2, 9).tolist() == [[5, 6], [7, 8], [2, 3]]
  assert copying.pieces(text, 2, 2).tolist() == [[5, 6], [2, 3]]
  assert copying.pieces(text, 4, 9).tolist() == [[5, 6, 7, 8]]
  assert copying.pieces(text, 5, 9).shape == (0, 5)


def test_rows_of_an_odd_length():
  batch = copying.rows(np.array([[4, 5]]), 5)
  assert batch['tokens'].tolist() == [[4, 5, 4, 5, 0]]
  assert batch['targets'].tolist() == [[5, -1, 5, -1, -1]]
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 1, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3, 4]]


def test_text_without_a_long_document(subject):
  corpus = subject.corpus
  short = corpus_lib.Corpus(
    corpus.tokenizer, corpus.train, (1.0,), split([0, 5, 1]), corpus.domains, '', ()
  )
  assert copying.measure(subject._replace(corpus=short)) is None
