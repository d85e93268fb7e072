"""A split's documents, end to end as one stream, cut into rows.

Row r reads the stream from r * L to (r + 1) * L, both ends included: L + 1 tokens, of which the
last is only a target and comes again as the next row's first input. So every token but each
document's first is predicted exactly once per epoch, and nothing is dropped. The last row is
padded.

  stream   B a b E B c E      L = 3   B, E: begin and end of a document
  row 0    tokens B a b   targets a b E    segment_ids 1 1 1   positions 0 1 2
  row 1    tokens E B c   targets - c E    segment_ids 1 2 2   positions 0 0 1

Axis letters: n documents.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.data import corpus

KEYS = ('tokens', 'targets', 'segment_ids', 'positions', 'domain_ids')


def num_rows(split: corpus.TokenSplit, max_seq_len: int) -> int:
  """Rows that `split` packs into, in any order; its first token is no target."""
  return -(-(split.num_tokens - 1) // max_seq_len)


def padding_row(max_seq_len: int) -> dict[str, np.ndarray]:
  """A row without any token: `targets` are -1, the rest is 0; all int32 [L]."""
  row = {key: np.zeros(max_seq_len, np.int32) for key in KEYS}
  row['targets'] -= 1
  return row


class Packing:
  """The rows of a split, each computed when it is asked for; immutable, so threads may share it."""

  def __init__(self, split: corpus.TokenSplit, order: np.ndarray, max_seq_len: int):
    """Lays out the stream.

    Args:
      split: the documents.
      order: [n] the order in which they follow each other.
      max_seq_len: L, the length of a row.
    """
    self._split = split
    self._order = order
    self._max_seq_len = max_seq_len
    lengths = np.diff(split.offsets)[order]
    self._starts = np.concatenate(
      [[0], np.cumsum(lengths)]
    )  # [n + 1] of each document in the stream
    self._num_rows = num_rows(split, max_seq_len)

  def __len__(self) -> int:
    return self._num_rows

  def padding_row(self) -> dict[str, np.ndarray]:
    """A row without any token."""
    return padding_row(self._max_seq_len)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns row `index`.

    Returns:
      int32 arrays [L]. `tokens`; `targets`, -1 where nothing is to be predicted: at padding and
      where the next token begins another document; `segment_ids`, 1, 2, ... for the documents in
      the row, 0 for padding; `positions`, counted from 0 in each segment; `domain_ids`, 0 for
      padding.
    """
    if not 0 <= index < self._num_rows:
      raise IndexError(f'row {index} of {self._num_rows}')
    length, total = self._max_seq_len, int(self._starts[-1])
    begin = index * length
    stream = np.arange(begin, min(begin + length + 1, total))  # stream positions, at most L + 1
    first = np.searchsorted(self._starts, begin, side='right') - 1
    last = np.searchsorted(self._starts, stream[-1], side='right') - 1
    starts = self._starts[first : last + 1]
    segment = np.searchsorted(starts, stream, side='right') - 1  # 0, 1, ... within the row
    document = self._order[first : last + 1]
    ids = self._split.tokens[(self._split.offsets[document] - starts)[segment] + stream]

    same = segment[1:] == segment[:-1]
    count = min(length, len(stream))
    segment = segment[:count]
    row = padding_row(length)
    row['tokens'][:count] = ids[:count]
    row['targets'][: len(same)] = np.where(same, ids[1:].astype(np.int32), -1)
    row['segment_ids'][:count] = segment + 1
    row['positions'][:count] = stream[:count] - np.maximum(starts, begin)[segment]
    row['domain_ids'][:count] = self._split.doc_domain[document][segment]
    return row


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Rows of [L] arrays, all with the same keys, to a batch of [B, L] arrays."""
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
