import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import packing, pipeline

LENGTH = 8


@pytest.fixture
def corpus(make_split, make_corpus):
  """300 tokens in 30 documents: 38 rows of 8."""
  return make_corpus(make_split([4, 16, 10] * 10, first=1))


def options(**overrides):
  defaults = dict(seed=0, max_seq_len=LENGTH, batch_size_at=lambda n: 4, num_steps=30)
  return defaults | overrides


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def ramp(step: int) -> int:
  return 4 if step < 3 else 8 if step < 7 else 12


@pytest.mark.parametrize('batch_size_at', [lambda n: 4, ramp])
@pytest.mark.parametrize('prefetch', [1, 8])
def test_a_batch_is_a_pure_function_of_its_step(corpus, batch_size_at, prefetch):
  batches = pipeline.TrainBatches(corpus, **options(batch_size_at=batch_size_at))
  for start in (0, 1, 5, 29, 30, 31):
    stream = pipeline.train_batches(
      corpus, **options(batch_size_at=batch_size_at), start_step=start, prefetch=prefetch
    )
    got = list(stream)
    assert len(got) == max(30 - start, 0)
    for step, batch in enumerate(got, start=start):
      assert batch['tokens'].shape == (batch_size_at(step), LENGTH)
      assert all(array.dtype == np.int32 for array in batch.values())
      assert equal(batch, batches[step])


@pytest.mark.parametrize('other', [2, 8])
def test_another_batch_size_goes_on_behind_the_last_row(corpus, other):
  before = pipeline.TrainBatches(corpus, **options())
  stream = pipeline.StreamStart(5, pipeline.START.first_row(lambda n: 4, 5))
  after = pipeline.TrainBatches(corpus, **options(batch_size_at=lambda n: other), stream=stream)
  rows = [before[n]['tokens'] for n in range(5)] + [after[n]['tokens'] for n in range(5, 8)]
  unbroken = pipeline.TrainBatches(corpus, **options(batch_size_at=lambda n: 1, num_steps=99))
  for i, row in enumerate(np.concatenate(rows)):
    np.testing.assert_array_equal(row, unbroken[i]['tokens'][0])
  assert stream.first_row(lambda n: other, 8) == 5 * 4 + 3 * other == i + 1


def test_a_longer_run_begins_with_the_same_batches(corpus):
  short = pipeline.TrainBatches(corpus, **options())
  long = pipeline.TrainBatches(corpus, **options(num_steps=100))
  assert all(equal(short[n], long[n]) for n in range(30))


@pytest.mark.parametrize('count', [1, 2])
def test_processes_share_the_global_batch(corpus, count):
  whole = pipeline.TrainBatches(corpus, **options(batch_size_at=ramp))
  # Process i has the parts i and i + count: those of a process need not be neighbours.
  streams = [
    pipeline.train_batches(
      corpus,
      **options(batch_size_at=ramp, num_steps=10),
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
  batches = pipeline.TrainBatches(corpus, **options(batch_size_at=lambda n: 1, num_steps=3 * rows))
  firsts = [int(batches[n]['tokens'][0, 0]) for n in range(3 * rows)]
  epochs = [firsts[e * rows : (e + 1) * rows] for e in range(3)]
  assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
  assert len(set(epochs[0])) == rows
  assert all(a != b for a, b in itertools.combinations([*epochs, sorted(epochs[0])], 2))


def test_an_epoch_predicts_every_token_but_the_first_of_each_document_once(corpus):
  (split,) = corpus.train
  rows = packing.num_rows(split, LENGTH)
  batches = pipeline.TrainBatches(corpus, **options(batch_size_at=lambda n: rows, num_steps=2))
  for n in range(2):
    targets = batches[n]['targets']
    assert (targets >= 0).sum() == split.num_tokens - split.num_documents
    assert len(set(targets[targets >= 0])) == split.num_tokens - split.num_documents


def test_neighbouring_seeds_share_nothing(corpus):
  # Grain shuffles epoch e with seed + e: unhashed, epoch 1 of seed 0 would be epoch 0 of seed 1.
  rows = packing.num_rows(corpus.train[0], LENGTH)
  size = {'batch_size_at': lambda n: rows, 'num_steps': 2}
  first = pipeline.TrainBatches(corpus, **options(seed=0, **size))
  second = pipeline.TrainBatches(corpus, **options(seed=1, **size))
  for a, b in itertools.product(range(2), range(2)):
    assert not equal(first[a], second[b])
  pipeline.TrainBatches(corpus, **options(seed=2**40))


def test_mixture_shares_approach_the_weights(make_split, make_corpus):
  parts = [make_split([9] * 20, first=1 + 200 * i, domain=i) for i in range(3)]
  weights = (0.2, 0.5, 0.3)
  corpus = make_corpus(*parts, weights=weights)
  batches = pipeline.TrainBatches(corpus, **options(batch_size_at=lambda n: 10, num_steps=50))
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
from moe_jax.data import corpus, pipeline
split = corpus.TokenSplit(
  np.arange(300, dtype=np.uint16), np.arange(0, 301, 10), np.full(30, 10), np.zeros(30, np.int32))
whole = corpus.Corpus(None, (split,), (1.0,), split, ('a',), '', ())
stream = pipeline.train_batches(
  whole, seed=0, max_seq_len=8, batch_size_at=lambda n: 4, start_step=0, num_steps=10**5)
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
    pipeline.train_batches(corpus, **options(batch_size_at=lambda n: 39), start_step=0)


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
