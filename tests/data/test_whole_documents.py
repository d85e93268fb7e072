import dataclasses
import random

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import batch_sizes
from moe_jax.data import pipeline, whole_documents

LENGTH = 8


def learned_split(make_split, lengths, learned=None):
  split = make_split(lengths)
  learned = (
    np.ones(split.num_tokens, np.uint8) if learned is None else np.asarray(learned, np.uint8)
  )
  return dataclasses.replace(split, learned=learned)


def documents_of(row):
  """(tokens, targets) of every document in a row."""
  number = row['segment_ids']
  return [
    (row['tokens'][number == i].tolist(), row['targets'][number == i].tolist())
    for i in range(1, number.max() + 1)
  ]


def test_a_row_by_hand(make_split):
  # Documents 0 1 2 | 3 4 5 6 7 8 | 9 10: 2, 5 and 1 places; 5 + 2 + 1 fill a row of 8.
  learned = [0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1]
  rows = whole_documents.WholeDocuments(
    learned_split(make_split, [3, 6, 2], learned), np.arange(3), LENGTH
  )
  assert len(rows) == 1
  row = rows[0]
  assert row['tokens'].tolist() == [3, 4, 5, 6, 7, 0, 1, 9]
  assert row['targets'].tolist() == [4, 5, 6, -1, 8, -1, 2, 10]
  assert row['segment_ids'].tolist() == [1, 1, 1, 1, 1, 2, 2, 3]
  assert row['positions'].tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
  with pytest.raises(IndexError):
    rows[1]


@pytest.mark.parametrize('seed', range(60))
def test_every_document_that_fits_stands_whole_in_one_row(make_split, seed):
  rng = random.Random(seed)
  lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 40))]
  split = learned_split(make_split, lengths)
  order = np.array(rng.sample(range(len(lengths)), len(lengths)))
  rows = whole_documents.WholeDocuments(split, order, LENGTH)
  assert len(rows) == whole_documents.num_rows(split, LENGTH) == pipeline.num_rows(split, LENGTH)
  found = [document for row in rows for document in documents_of(row)]
  fits = [i for i, n in enumerate(lengths) if 2 <= n <= LENGTH + 1]
  starts = split.offsets.tolist()
  want = [list(range(starts[i], starts[i + 1])) for i in fits]
  assert sorted([*tokens, targets[-1]] for tokens, targets in found) == sorted(want)
  assert all(targets == [*tokens[1:], targets[-1]] for tokens, targets in found)
  assert pipeline.num_bytes(split, LENGTH) == sum(lengths[i] for i in fits)
  assert pipeline.num_left_out(split, LENGTH) == len(lengths) - len(fits)


def test_each_goes_where_it_leaves_the_least_room(make_split):
  # Places 6, 5, 3, 2, falling: 3 goes to the 5, not into a row of its own; 2 goes to the 6.
  rows = whole_documents.WholeDocuments(
    learned_split(make_split, [4, 7, 3, 6]), np.arange(4), LENGTH
  )
  assert [row['segment_ids'].tolist() for row in rows] == [[1] * 6 + [2] * 2, [1] * 5 + [2] * 3]


def test_the_order_decides_among_equals(make_split):
  split = learned_split(make_split, [5] * 6)
  first = whole_documents.WholeDocuments(split, np.arange(6), LENGTH)[0]['tokens'].tolist()
  other = whole_documents.WholeDocuments(split, np.arange(6)[::-1], LENGTH)[0]['tokens'].tolist()
  assert first == [0, 1, 2, 3, 5, 6, 7, 8] and other == [25, 26, 27, 28, 20, 21, 22, 23]


def test_nothing_is_lost_between_pipeline_and_rows(make_split, make_corpus):
  split = learned_split(make_split, [5, 3, 4, 6, 2, 9, 3, 8, 20])
  corpus = make_corpus(split)
  steps = pipeline.num_rows(split, LENGTH)
  batches = list(
    pipeline.train_batches(
      corpus,
      seed=3,
      max_seq_len=LENGTH,
      batch_sizes=batch_sizes.BatchSizes(1),
      start_step=0,
      num_steps=steps,
    )
  )
  targets = np.concatenate([batch['targets'].ravel() for batch in batches])
  assert len(targets[targets >= 0]) == sum(n - 1 for n in (5, 3, 4, 6, 2, 9, 3, 8))


def test_documents_longer_than_a_row_are_told_of_with_the_length_that_they_need(
  make_split, make_corpus
):
  corpus = make_corpus(learned_split(make_split, [12, 20, 30]))
  with pytest.raises(errors.InputError) as told:
    pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[4])
  # 29 places, as the last token is a target only; there is no batch size that would help.
  assert '3 of its 3 conversations or pairs are left out' in str(told.value)
  assert 'the longest takes 29 places' in str(told.value)
  assert 'use a longer config.model.max_seq_len' in str(told.value)
  with pytest.raises(errors.InputError, match='use batch_size <= 1, a shorter max_seq_len'):
    pipeline.check_corpus(
      make_corpus(learned_split(make_split, [5, 3])), max_seq_len=LENGTH, batch_sizes=[4]
    )


def test_a_held_out_split_without_a_row_is_refused(make_split, make_corpus):
  corpus = make_corpus(learned_split(make_split, [5, 3]))
  fits = dataclasses.replace(corpus, heldout=learned_split(make_split, [5, 20]))
  pipeline.check_heldout(fits, LENGTH)
  long = dataclasses.replace(corpus, heldout=learned_split(make_split, [12, 20]))
  words = r'no row of config\.model\.max_seq_len=8: of its 2 documents 2 do not fit'
  with pytest.raises(errors.InputError, match=words):
    pipeline.check_heldout(long, LENGTH)
  empty = dataclasses.replace(fits.heldout, doc_bytes=np.zeros(2, np.int64))
  with pytest.raises(errors.InputError, match='all answers are empty'):
    pipeline.check_heldout(dataclasses.replace(corpus, heldout=empty), LENGTH)
