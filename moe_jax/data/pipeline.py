"""Corpus to batches. The batch at step n is a pure function of (corpus, seed, n).

The training rows form one endless stream with random access: each component's rows, shuffled anew
in every epoch, interleaved by weight. Step n takes the rows after those of all earlier steps, and
each process those parts of them that its devices hold. So resuming needs only n, and any mesh and
number of processes sees the same global batch. With another batch size a run goes on behind the
last row that it has read, see `StreamStart`. Threads read ahead of the device; they change when a
batch is made, never which.

Axis letters are those of `moe_jax.models`, B being a global batch; its `num_shards` equal parts are
shared out among the processes.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import grain
import numpy as np

from moe_jax import errors
from moe_jax.config import batch_sizes as batch_sizes_lib
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import packing, whole_documents

Batch = dict[str, np.ndarray]

_THREADS = 2  # numpy holds the interpreter most of the time, so more would only wait for each other


class StreamStart(NamedTuple):
  """Where in the stream of rows a run's batch sizes took over; not 0, 0 only if they changed."""

  step: int = 0
  row: int = 0  # the first one of that step's batch

  def first_row(self, sizes: batch_sizes_lib.BatchSizes, step: int) -> int:
    """The row with which the batch of `step` begins; `step` may not lie before the start."""
    return self.row + sizes.before(step) - sizes.before(self.step)


START = StreamStart()


def rows_of(
  split: corpus_lib.TokenSplit, order: np.ndarray, max_seq_len: int
) -> packing.Packing | whole_documents.WholeDocuments:
  """The rows of a split: its text as one stream that is cut, or whole conversations."""
  kind = packing.Packing if split.learned is None else whole_documents.WholeDocuments
  return kind(split, order, max_seq_len)


def num_rows(split: corpus_lib.TokenSplit, max_seq_len: int) -> int:
  """How many rows `rows_of` has, in any order."""
  return (packing if split.learned is None else whole_documents).num_rows(split, max_seq_len)


def num_bytes(split: corpus_lib.TokenSplit, max_seq_len: int) -> int:
  """Bytes of text that the targets in the rows of a split spell."""
  if split.learned is None:
    return split.num_bytes
  return int(split.doc_bytes[whole_documents.fits(split, max_seq_len)].sum())


def heldout_bytes(corpus: corpus_lib.Corpus, max_seq_len: int) -> bytes:
  """The held-out text whose bytes `num_bytes` counts: without conversations that are left out."""
  text, split = corpus.heldout_bytes(), corpus.heldout
  if split.learned is None:
    return text
  ends, fits = np.cumsum(split.doc_bytes), whole_documents.fits(split, max_seq_len)
  parts = zip((ends - split.doc_bytes)[fits].tolist(), ends[fits].tolist())
  return b''.join(text[begin:end] for begin, end in parts)


def num_left_out(split: corpus_lib.TokenSplit, max_seq_len: int) -> int:
  """Conversations that no row has room for, or in which there is nothing to predict."""
  if split.learned is None:
    return 0
  return int((~whole_documents.fits(split, max_seq_len)).sum())


def check_corpus(
  corpus: corpus_lib.Corpus,
  *,
  max_seq_len: int,
  batch_sizes: Iterable[int],
  num_shards: int = 1,
):
  """Checks that every batch can be filled with distinct rows and divided into parts.

  Args:
    corpus: the text.
    max_seq_len: L.
    batch_sizes: every global batch size that the run will use.
    num_shards: S.

  Raises:
    errors.InputError: names the numbers and the ways out.
  """
  sizes = set(batch_sizes)
  for size in sorted(sizes):
    if size % num_shards:
      raise errors.InputError(
        f'config.train.batch_size={size} (or a size of train.batch_ramp) must be divisible by '
        f'{num_shards}, the parts that devices take it in; choose '
        f'{-(-size // num_shards) * num_shards}, or change config.mesh'
      )
  largest = max(sizes, default=0)
  for i, (split, weight) in enumerate(zip(corpus.train, corpus.weights)):
    rows = num_rows(split, max_seq_len)
    needed = max(int(largest * weight), 1)  # a member without a row could never be drawn from
    if rows < needed:
      # A mixture's labels are its components' names, in this order.
      part = f' of component {corpus.domains[i]!r}' if len(corpus.train) > 1 else ''
      raise errors.InputError(
        f'config.train.batch_size={largest} takes {needed} rows{part} of config.model.max_seq_len='
        f'{max_seq_len} tokens, but the training split{part} packs into only {rows} '
        f'({split.num_tokens} tokens); {_way_out(split, max_seq_len, int(rows / weight))}'
      )


def check_heldout(corpus: corpus_lib.Corpus, max_seq_len: int):
  """Checks that there is something to measure on.

  Args:
    corpus: the text.
    max_seq_len: L.

  Raises:
    errors.InputError: the held-out split has no row, or no byte to be predicted.
  """
  split = corpus.heldout
  if num_rows(split, max_seq_len):
    errors.require(
      num_bytes(split, max_seq_len) > 0,
      f'the {split.num_documents} held-out documents have no byte that is learned: all answers are '
      'empty; correct the data of config.data.path',
    )
    return
  lost = num_left_out(split, max_seq_len)
  raise errors.InputError(
    f'the held-out split has no row of config.model.max_seq_len={max_seq_len}: of its '
    f'{split.num_documents} documents {lost} do not fit, or have nothing to predict; use a longer '
    'max_seq_len, a larger config.data.heldout_fraction, or other text (config.data.path)'
  )


def _way_out(split: corpus_lib.TokenSplit, max_seq_len: int, largest: int) -> str:
  """What to change where a split has rows for `largest` at most."""
  smaller = f'use batch_size <= {largest}, ' if largest else 'use '
  left_out = num_left_out(split, max_seq_len)
  if not left_out:
    return f'{smaller}a shorter max_seq_len, or more text (config.data.path)'
  places = whole_documents.places(split)
  return (
    f'{left_out} of its {len(places)} conversations or pairs are left out, as none is cut and the '
    f'longest takes {places.max()} places (a pair: both answers, each with its prompt); {smaller}'
    'a longer config.model.max_seq_len, or more text (config.data.path)'
  )


class TrainBatches:
  """This process's parts of the global batches, by step: a source with random access for grain."""

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    *,
    seed: int,
    max_seq_len: int,
    batch_sizes: batch_sizes_lib.BatchSizes,
    num_steps: int,
    stream: StreamStart = START,
    shards: Sequence[int] = (0,),
    num_shards: int = 1,
  ):
    """Lays out the row stream; arguments as in `train_batches`."""
    check_corpus(
      corpus,
      max_seq_len=max_seq_len,
      batch_sizes=batch_sizes.used(num_steps),
      num_shards=num_shards,
    )
    self._sizes, self._stream, self._num_steps = batch_sizes, stream, num_steps
    self._rows = _row_stream(corpus, seed, max_seq_len)
    self._shards, self._num_shards = tuple(shards), num_shards

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> Batch:
    """The own parts of the batch of `step`, arrays [own rows, L] int32, see `packing.Packing`."""
    start = self._stream.first_row(self._sizes, step)
    share = self._sizes.at(step) // self._num_shards
    begins = [start + shard * share for shard in self._shards]
    return packing.stack([self._rows[i] for begin in begins for i in range(begin, begin + share)])


def _row_stream(corpus: corpus_lib.Corpus, seed: int, max_seq_len: int) -> Sequence[Batch]:
  """All epochs of all components' rows, by index."""
  components = []
  for i, split in enumerate(corpus.train):
    # Hashed, so that neighbouring seeds share nothing: grain shuffles epoch e with (seed + e).
    order_seed, shuffle_seed = np.random.SeedSequence([seed, i]).generate_state(2).tolist()
    order = np.random.default_rng(order_seed).permutation(split.num_documents)
    rows = grain.MapDataset.source(cast(Sequence[Batch], rows_of(split, order, max_seq_len)))
    components.append(rows.shuffle(seed=shuffle_seed).repeat())
  if len(components) == 1:
    return components[0]
  # Read by index alone; a filter, which makes grain's elements optional, is not among the steps.
  return cast(Sequence[Batch], grain.MapDataset.mix(components, weights=corpus.weights))


def train_batches(
  corpus: corpus_lib.Corpus,
  *,
  seed: int,
  max_seq_len: int,
  batch_sizes: batch_sizes_lib.BatchSizes,
  start_step: int,
  num_steps: int,
  stream: StreamStart = START,
  shards: Sequence[int] = (0,),
  num_shards: int = 1,
  prefetch: int = 8,
) -> Generator[Batch, None, None]:
  """Yields this process's batches of the steps start_step, ..., num_steps - 1.

  Args:
    corpus: the text.
    seed: decides the order of documents and rows.
    max_seq_len: L.
    batch_sizes: B of each step.
    start_step: first step to yield.
    num_steps: length of the whole run.
    stream: where the batch sizes took over; no earlier step is asked for.
    shards: which parts of the global batch, see `partitioning.row_shards`.
    num_shards: must divide every batch size.
    prefetch: batches made ahead.

  Returns:
    An iterator of dicts of int32 [B * len(shards) / num_shards, L], see `packing.Packing`. Closing
    it, or leaving it, ends its threads.

  Raises:
    errors.InputError: at once, see `check_corpus`.
  """
  source = TrainBatches(
    corpus,
    seed=seed,
    max_seq_len=max_seq_len,
    batch_sizes=batch_sizes,
    num_steps=num_steps,
    stream=stream,
    shards=shards,
    num_shards=num_shards,
  )
  return _prefetched(source, start_step, prefetch)


def _prefetched(
  source: TrainBatches, start_step: int, prefetch: int
) -> Generator[Batch, None, None]:
  if start_step >= len(source):
    return
  steps = grain.MapDataset.source(cast(Sequence[Batch], source))[start_step:]
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=prefetch)
  iterator = iter(steps.to_iter_dataset(options))
  try:
    yield from iterator
  finally:
    iterator.close()


def heldout_batches(
  corpus: corpus_lib.Corpus, max_seq_len: int, batch_size: int
) -> Iterator[Batch]:
  """Yields the held-out rows in natural order, int32 [B, L]; padding rows fill the last batch."""
  rows = rows_of(corpus.heldout, np.arange(corpus.heldout.num_documents), max_seq_len)
  for begin in range(0, len(rows), batch_size):
    batch = [rows[i] for i in range(begin, min(begin + batch_size, len(rows)))]
    yield packing.stack(batch + [rows.padding_row()] * (batch_size - len(batch)))
