import numpy as np
import pytest

from moe_jax.data import corpus, packing


def reference_rows(split: corpus.TokenSplit, order, length: int) -> list[dict[str, list[int]]]:
  """The same rows, token by token."""
  stream = [
    (int(split.tokens[p]), d) for d in order for p in range(split.offsets[d], split.offsets[d + 1])
  ]
  rows = []
  for begin in range(0, len(stream) - 1, length):
    row = {key: [] for key in packing.KEYS}
    segment, position, previous = 0, 0, None
    for p in range(begin, begin + length):
      if p >= len(stream):
        values = (0, -1, 0, 0, 0)
      else:
        token, document = stream[p]
        segment, position = (segment, position + 1) if document == previous else (segment + 1, 0)
        following = stream[p + 1] if p + 1 < len(stream) else (0, None)
        target = following[0] if following[1] == document else -1
        values = (token, target, segment, position, int(split.doc_domain[document]))
        previous = document
      for key, value in zip(packing.KEYS, values):
        row[key].append(value)
    rows.append(row)
  return rows


def test_by_hand():
  # Documents "B a b E" and "B c E" as 10 11 12 13 and 20 21 22, of the domains 1 and 2.
  split = corpus.TokenSplit(
    tokens=np.array([10, 11, 12, 13, 20, 21, 22], np.uint16),
    offsets=np.array([0, 4, 7]),
    doc_bytes=np.array([2, 1]),
    doc_domain=np.array([1, 2]),
  )
  rows = packing.Packing(split, np.array([0, 1]), 3)
  assert len(rows) == 2
  expected = [
    dict(tokens=[10, 11, 12], targets=[11, 12, 13], segment_ids=[1, 1, 1], positions=[0, 1, 2]),
    dict(tokens=[13, 20, 21], targets=[-1, 21, 22], segment_ids=[1, 2, 2], positions=[0, 0, 1]),
  ]
  for r, domains in enumerate([[1, 1, 1], [1, 2, 2]]):
    got = {key: value.tolist() for key, value in rows[r].items()}
    assert got == expected[r] | {'domain_ids': domains}
  # Longer rows: the last token is an input without a target, and padding follows.
  row = packing.Packing(split, np.array([1, 0]), 9)[0]
  assert row['tokens'].tolist() == [20, 21, 22, 10, 11, 12, 13, 0, 0]
  assert row['targets'].tolist() == [21, 22, -1, 11, 12, 13, -1, -1, -1]
  assert row['segment_ids'].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
  assert row['domain_ids'].tolist() == [2, 2, 2, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize('length', [1, 2, 3, 7, 16, 64, 1000])
def test_agrees_with_token_by_token_packing(make_split, length):
  rng = np.random.default_rng(length)
  lengths = rng.integers(2, 30, size=25)
  split = make_split(lengths, first=5)
  split.doc_domain[:] = rng.integers(0, 3, size=25)
  order = rng.permutation(25)
  rows = packing.Packing(split, order, length)
  expected = reference_rows(split, order, length)
  assert len(rows) == len(expected) == packing.num_rows(split, length)
  for got, want in zip(rows, expected):
    assert all(array.dtype == np.int32 for array in got.values())
    assert {key: value.tolist() for key, value in got.items()} == want


@pytest.mark.parametrize('length', [1, 5, 12, 13, 100])
@pytest.mark.parametrize('lengths', [[2], [13], [2, 3, 8], [30, 2, 2, 2, 61, 5]])
def test_every_token_but_the_first_of_each_document_is_predicted_once(make_split, lengths, length):
  split = make_split(lengths)
  targets = [row['targets'] for row in packing.Packing(split, np.arange(len(lengths)), length)]
  predicted = np.concatenate(targets)
  predicted = predicted[predicted >= 0]
  assert len(predicted) == split.num_tokens - split.num_documents
  assert sorted(predicted) == sorted(set(range(split.num_tokens)) - set(split.offsets[:-1]))


def test_segments_never_mix_documents(make_split):
  split = make_split([4, 9, 2, 17, 5, 3])
  document_of = np.searchsorted(split.offsets, np.arange(split.num_tokens), side='right')
  for row in packing.Packing(split, np.array([3, 1, 5, 0, 2, 4]), 8):
    real = row['segment_ids'] > 0
    for segment in set(row['segment_ids'][real]):
      tokens = row['tokens'][row['segment_ids'] == segment]
      assert len(set(document_of[tokens])) == 1
      assert (np.diff(tokens) == 1).all()
    known = row['targets'] >= 0
    assert (document_of[row['targets'][known]] == document_of[row['tokens'][known]]).all()
    assert (row['targets'][known] == row['tokens'][known] + 1).all()


def test_index_out_of_range(make_split):
  rows = packing.Packing(make_split([5]), np.array([0]), 2)
  assert len(rows) == 2
  for index in (2, -1):
    with pytest.raises(IndexError):
      rows[index]


def test_padding_row_and_stack():
  batch = packing.stack([packing.padding_row(4)] * 3)
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict.fromkeys(
    packing.KEYS, ((3, 4), np.int32)
  )
  assert (batch['targets'] == -1).all() and not batch['segment_ids'].any()
