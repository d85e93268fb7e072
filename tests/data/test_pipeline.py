import itertools
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import batch_sizes as batch_sizes_lib
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import packing, pipeline

LENGTH = 8
SIZES = batch_sizes_lib.BatchSizes
RAMP = SIZES(12, ((3, 4), (7, 8)))


@pytest.fixture
def corpus(make_split, make_corpus):
  """300 tokens in 30 documents: 38 rows of 8."""
  return make_corpus(make_split([4, 16, 10] * 10, first=1))


def options(**overrides):
  defaults = dict(seed=0, max_seq_len=LENGTH, batch_sizes=SIZES(4), num_steps=30)
  return defaults | overrides


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('batch_sizes', [SIZES(4), RAMP])
@pytest.mark.parametrize('prefetch', [1, 8])
def test_a_batch_is_a_pure_function_of_its_step(corpus, batch_sizes, prefetch):
  batches = pipeline.TrainBatches(corpus, **options(batch_sizes=batch_sizes))
  for start in (0, 1, 5, 29, 30, 31):
    stream = pipeline.train_batches(
      corpus, **options(batch_sizes=batch_sizes), start_step=start, prefetch=prefetch
    )
    got = list(stream)
    assert len(got) == max(30 - start, 0)
    for step, batch in enumerate(got, start=start):
      assert batch['tokens'].shape == (batch_sizes.at(step), LENGTH)
      assert all(array.dtype == np.int32 for array in batch.values())
      assert equal(batch, batches[step])


@pytest.mark.parametrize('other', [2, 8])
def test_another_batch_size_goes_on_behind_the_last_row(corpus, other):
  before = pipeline.TrainBatches(corpus, **options())
  stream = pipeline.StreamStart(5, pipeline.START.first_row(SIZES(4), 5))
  after = pipeline.TrainBatches(corpus, **options(batch_sizes=SIZES(other)), stream=stream)
  rows = [before[n]['tokens'] for n in range(5)] + [after[n]['tokens'] for n in range(5, 8)]
  unbroken = pipeline.TrainBatches(corpus, **options(batch_sizes=SIZES(1), num_steps=99))
  for i, row in enumerate(np.concatenate(rows)):
    np.testing.assert_array_equal(row, unbroken[i]['tokens'][0])
  assert stream.first_row(SIZES(other), 8) == 5 * 4 + 3 * other == i + 1


def test_a_longer_run_begins_with_the_same_batches(corpus):
  short = pipeline.TrainBatches(corpus, **options())
  long = pipeline.TrainBatches(corpus, **options(num_steps=100))
  assert all(equal(short[n], long[n]) for n in range(30))


@pytest.mark.parametrize('sizes', [SIZES(4), RAMP, SIZES(4, ((30, 8),)), SIZES(4, ((40, 8),))])
@pytest.mark.parametrize('start', [(0, 0), (5, 17), (29, 9)])
def test_a_batch_has_the_rows_that_sums_over_all_steps_give(corpus, sizes, start):
  """As they were computed when there was an array with an entry per step."""
  num_steps = 30
  ends = np.concatenate([[0], np.cumsum([sizes.at(n) for n in range(num_steps)])])
  firsts = ends + (start[1] - ends[start[0]])
  stream = pipeline.StreamStart(*start)
  batches = pipeline.TrainBatches(corpus, **options(batch_sizes=sizes), stream=stream)
  unbroken = pipeline.TrainBatches(corpus, **options(batch_sizes=SIZES(1), num_steps=500))
  for step in range(start[0], num_steps):
    rows = [unbroken[int(i)] for i in range(firsts[step], firsts[step + 1])]
    want = {key: np.concatenate([row[key] for row in rows]) for key in packing.KEYS}
    assert equal(batches[step], want)


def test_the_longest_run_needs_no_memory_for_its_steps(corpus):
  longest = options(num_steps=2**31 - 1, batch_sizes=RAMP)
  tracemalloc.start()
  try:
    first = next(pipeline.train_batches(corpus, **longest, start_step=0))
    batches = pipeline.TrainBatches(corpus, **longest)
    assert len(batches) == 2**31 - 1 and equal(first, batches[0])
    assert len(batches[2**31 - 2]['tokens']) == 12
    assert tracemalloc.get_traced_memory()[1] < 2**25
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('count', [1, 2])
def test_processes_share_the_global_batch(corpus, count):
  whole = pipeline.TrainBatches(corpus, **options(batch_sizes=RAMP))
  # Process i has the parts i and i + count: those of a process need not be neighbours.
  streams = [
    pipeline.train_batches(
      corpus,
      **options(batch_sizes=RAMP, num_steps=10),
      start_step=2,
      shards=(i, i + count),
      num_shards=2 * count,
    )
    for i in range(count)
  ]
  for step, slices in enumerate(zip(*streams, strict=True), start=2):
    halves = [[np.split(s[key], 2) for s in slices] for key in packing.KEYS]
    joined = [np.concatenate([h[k] for k in (0, 1) for h in half]) for half in halves]
    assert equal(dict(zip(packing.KEYS, joined)), whole[step])


def test_epochs_hold_every_row_once_in_a_new_order(corpus):
  rows = packing.num_rows(corpus.train[0], LENGTH)
  batches = pipeline.TrainBatches(corpus, **options(batch_sizes=SIZES(1), num_steps=3 * rows))
  firsts = [int(batches[n]['tokens'][0, 0]) for n in range(3 * rows)]
  epochs = [firsts[e * rows : (e + 1) * rows] for e in range(3)]
  assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
  assert len(set(epochs[0])) == rows
  assert all(a != b for a, b in itertools.combinations([*epochs, sorted(epochs[0])], 2))


def test_an_epoch_predicts_every_token_but_the_first_of_each_document_once(corpus):
  (split,) = corpus.train
  rows = packing.num_rows(split, LENGTH)
  batches = pipeline.TrainBatches(corpus, **options(batch_sizes=SIZES(rows), num_steps=2))
  for n in range(2):
    targets = batches[n]['targets']
    assert (targets >= 0).sum() == split.num_tokens - split.num_documents
    assert len(set(targets[targets >= 0])) == split.num_tokens - split.num_documents


def test_neighbouring_seeds_share_nothing(corpus):
  # Grain shuffles epoch e with seed + e: unhashed, epoch 1 of seed 0 would be epoch 0 of seed 1.
  rows = packing.num_rows(corpus.train[0], LENGTH)
  size = {'batch_sizes': SIZES(rows), 'num_steps': 2}
  first = pipeline.TrainBatches(corpus, **options(seed=0, **size))
  second = pipeline.TrainBatches(corpus, **options(seed=1, **size))
  for a, b in itertools.product(range(2), range(2)):
    assert not equal(first[a], second[b])
  pipeline.TrainBatches(corpus, **options(seed=2**40))


def test_mixture_shares_approach_the_weights(make_split, make_corpus):
  parts = [make_split([9] * 20, first=1 + 200 * i, domain=i) for i in range(3)]
  weights = (0.2, 0.5, 0.3)
  corpus = make_corpus(*parts, weights=weights)
  batches = pipeline.TrainBatches(corpus, **options(batch_sizes=SIZES(10), num_steps=50))
  domains = np.concatenate([batches[n]['domain_ids'][:, 0] for n in range(50)])
  shares = np.bincount(domains, minlength=3) / len(domains)
  assert np.abs(shares - weights).max() < 0.01
  for n in range(50):
    batch = batches[n]
    real = batch['segment_ids'] > 0
    assert ((batch['tokens'] - 1) // 200 == batch['domain_ids'])[real].all()
    # Interleaved evenly, so that even one batch is near the weights.
    counts = np.bincount(batch['domain_ids'][:, 0], minlength=3)
    assert np.abs(counts - 10 * np.asarray(weights)).max() <= 1


def test_heldout_batches(corpus):
  split = corpus.heldout
  batches = list(pipeline.heldout_batches(corpus, LENGTH, 5))
  assert len(batches) == 8  # 38 rows
  assert all(batch['tokens'].shape == (5, LENGTH) for batch in batches)
  rows = packing.stack(packing.Packing(split, np.arange(30), LENGTH))
  joined = {key: np.concatenate([b[key] for b in batches]) for key in packing.KEYS}
  assert equal({key: value[:38] for key, value in joined.items()}, rows)
  assert (joined['targets'][38:] == -1).all() and not joined['segment_ids'][38:].any()
  assert (joined['targets'] >= 0).sum() == split.num_tokens - split.num_documents


def test_heldout_text_is_all_there(make_config):
  loaded = corpus_lib.load_corpus(make_config(), 300, 0, progress=False)
  ids = []
  for batch in pipeline.heldout_batches(loaded, 16, 3):
    ids += batch['targets'][batch['targets'] >= 0].tolist()
  assert loaded.tokenizer.decode(ids).encode('utf-8') == loaded.heldout_bytes()
  assert len(loaded.heldout_bytes()) == loaded.heldout.num_bytes


def test_leaving_the_iterator_ends_its_threads(corpus):
  stream = pipeline.train_batches(corpus, **options(num_steps=1000), start_step=0)
  next(stream)
  workers = [t for t in threading.enumerate() if t.name.startswith('grain-prefetch')]
  assert workers
  stream.close()
  for thread in workers:
    thread.join(timeout=10)
    assert not thread.is_alive()


SCRIPT = """
import numpy as np
from moe_jax.config import batch_sizes
from moe_jax.data import corpus, pipeline
split = corpus.TokenSplit(
  np.arange(300, dtype=np.uint16), np.arange(0, 301, 10), np.full(30, 10), np.zeros(30, np.int32))
whole = corpus.Corpus(None, (split,), (1.0,), split, ('a',), '', ())
stream = pipeline.train_batches(
  whole, seed=0, max_seq_len=8, batch_sizes=batch_sizes.BatchSizes(4), start_step=0,
  num_steps=10**5)
next(stream), next(stream)
"""


def test_the_interpreter_exits_with_an_open_iterator():
  command = [sys.executable, '-W', 'error', '-c', SCRIPT]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


# Bad input


def test_a_corpus_smaller_than_a_batch(corpus):
  pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[38])
  message = (
    r'batch_size=39 takes 39 rows of config\.model\.max_seq_len=8 .*only 38 .*batch_size <= 38'
  )
  with pytest.raises(errors.InputError, match=message):
    pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[4, 39])
  with pytest.raises(errors.InputError, match=message):  # at once, not at the first batch
    pipeline.train_batches(corpus, **options(batch_sizes=SIZES(39)), start_step=0)


def test_a_component_smaller_than_its_share(make_split, make_corpus):
  corpus = make_corpus(make_split([9] * 9), make_split([9] * 90), weights=(0.5, 0.5))
  pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[20])
  with pytest.raises(
    errors.InputError, match=r"takes 15 rows of component 'part0'.*only 10 .*<= 20"
  ):
    pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[30])


def test_a_component_without_a_row_is_refused_however_small_its_share(make_split, make_corpus):
  corpus = make_corpus(make_split([9] * 90), make_split([]), weights=(0.95, 0.05))
  with pytest.raises(errors.InputError, match=r"component 'part1'.*packs into only 0"):
    pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[4])


def test_a_batch_that_the_devices_cannot_share(corpus):
  with pytest.raises(
    errors.InputError, match=r'batch_size=6 .*divisible by 4, the parts .* choose 8'
  ):
    pipeline.check_corpus(corpus, max_seq_len=LENGTH, batch_sizes=[4, 6], num_shards=4)


def test_documents_and_rows_have_seeds_of_their_own(make_split, make_corpus, monkeypatch):
  """Every seed and every component has another order of documents and another one of rows."""
  orders = []

  def packed(split, order, length):
    orders.append(order.tolist())
    return list(range(50))

  monkeypatch.setattr(packing, 'Packing', packed)
  corpus = make_corpus(make_split([9] * 50))
  rows = [pipeline._row_stream(corpus, seed, LENGTH) for seed in (0, 1, 0)]
  epochs = [[int(stream[i]) for i in range(50)] for stream in rows]
  assert sorted(orders[0]) == sorted(epochs[0]) == list(range(50))
  assert orders[0] == orders[2] and epochs[0] == epochs[2]
  assert orders[0] != orders[1] and epochs[0] != epochs[1]
  assert list(range(50)) not in (orders[0], epochs[0])  # shuffled at all
  orders.clear()
  mixed = pipeline._row_stream(
    make_corpus(*[make_split([9] * 50)] * 2, weights=(0.5, 0.5)), 0, LENGTH
  )
  assert orders[0] != orders[1]
  turns = [int(mixed[i]) for i in range(100)]
  assert turns[::2] != turns[1::2]
