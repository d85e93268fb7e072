"""Rows of whole documents: none is cut, and none sees another.

A document of n tokens takes n - 1 places, as its last token is a target only. A pair of answers to
one prompt is one document and two segments side by side, 2 k + 1 and 2 k + 2. Documents are placed
longest first, each into the row that it fills best (best-fit decreasing), so which lengths share a
row depends on the lengths alone, and which documents of one length on the order. What is longer
than a row is left out, and counted.

Axis letters: n documents.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from moe_jax.data import corpus, packing


def fits(split: corpus.TokenSplit, max_seq_len: int) -> np.ndarray:
  """[n] bool, whether a document has a target, and goes into a row."""
  taken = places(split)
  return (taken >= 1) & (taken <= max_seq_len)


def places(split: corpus.TokenSplit) -> np.ndarray:
  """[n] places in a row that documents take."""
  return np.diff(split.offsets) - (1 if split.doc_chosen is None else 2)


def num_rows(split: corpus.TokenSplit, max_seq_len: int) -> int:
  """Rows that `split` packs into, in any order."""
  taken = places(split)[fits(split, max_seq_len)]
  return len(best_fit(np.sort(taken)[::-1], max_seq_len))


class WholeDocuments:
  """The rows of a split, each computed when it is asked for; immutable, so threads may share it."""

  def __init__(self, split: corpus.TokenSplit, order: np.ndarray, max_seq_len: int):
    """Lays out the rows.

    Args:
      split: the documents.
      order: [n] decides which of the documents of one length comes first.
      max_seq_len: L, the length of a row.
    """
    self._split, self._max_seq_len = split, max_seq_len
    order = order[fits(split, max_seq_len)[order]]
    taken = places(split)[order]
    longest_first = np.argsort(-taken, kind='stable')
    bins = best_fit(taken[longest_first], max_seq_len)
    self._rows = [order[longest_first[members]] for members in bins]

  def __len__(self) -> int:
    return len(self._rows)

  def padding_row(self) -> dict[str, np.ndarray]:
    """A row without any token."""
    row = packing.padding_row(self._max_seq_len)
    if self._split.reference is not None:
      row['reference'] = np.zeros(self._max_seq_len, np.float32)
    return row

  def documents(self, index: int) -> np.ndarray:
    """The documents in row `index`, in order; of pairs the k-th is segments 2 k + 1 and 2 k + 2."""
    return self._rows[index]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Row `index`: arrays as of `packing.Packing`, with targets only where they are learned.

    Of pairs whose log-probabilities under the reference are known also `reference`, [L] float32,
    each segment's at its first place and 0 elsewhere.
    """
    if not 0 <= index < len(self._rows):
      raise IndexError(f'row {index} of {len(self._rows)}')
    row, at, segment = self.padding_row(), 0, 0
    for document in self._rows[index]:
      for half, here in enumerate(self._segments(document)):
        segment += 1
        ids = np.asarray(self._split.tokens[here]).astype(np.int32)
        learned = np.ones(len(ids), bool)
        if self._split.learned is not None:
          learned = np.asarray(self._split.learned[here], bool)
        to = slice(at, at + len(ids) - 1)
        row['tokens'][to] = ids[:-1]
        row['targets'][to] = np.where(learned[1:], ids[1:], -1)
        row['segment_ids'][to] = segment
        row['positions'][to] = np.arange(len(ids) - 1)
        row['domain_ids'][to] = self._split.doc_domain[document]
        if self._split.reference is not None:
          row['reference'][at] = self._split.reference[document, half]
        at = to.stop
    return row

  def _segments(self, document: int) -> list[slice]:
    """Where the tokens of a document are; of a pair those of each answer."""
    begin, end = self._split.offsets[document : document + 2]
    if self._split.doc_chosen is None:
      return [slice(begin, end)]
    middle = begin + self._split.doc_chosen[document]
    return [slice(begin, middle), slice(middle, end)]


def best_fit(places: np.ndarray, capacity: int) -> Sequence[list[int]]:
  """Best fit of falling sizes: the indices in each bin, bins in the order of their first one."""
  bins: list[list[int]] = []
  room: list[int] = []  # rising, of the bins that are not full
  owners: dict[int, list[int]] = {}  # room -> bins with so much of it, the oldest last
  for i, size in enumerate(places.tolist()):
    at = bisect.bisect_left(room, size)
    if at < len(room):
      left = room[at]
      number = owners[left].pop()
      if not owners[left]:
        del owners[left], room[at]
    else:
      left, number = capacity, len(bins)
      bins.append([])
    bins[number].append(i)
    left -= size
    if left:
      if left not in owners:
        owners[left] = []
        bisect.insort(room, left)
      owners[left].append(number)
  return bins
