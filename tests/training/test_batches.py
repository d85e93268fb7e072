import numpy as np

from moe_jax.config import batch_sizes
from moe_jax.data import corpus, pipeline
from moe_jax.devices import partitioning
from moe_jax.training import batches
from tests import tiny


def text(num_tokens=4000):
  rng = np.random.default_rng(0)
  split = corpus.TokenSplit(
    tokens=rng.integers(32, size=num_tokens).astype(np.uint16),
    offsets=np.arange(0, num_tokens + 1, 40),
    doc_bytes=np.full(num_tokens // 40, 40),
    doc_domain=np.zeros(num_tokens // 40, np.int32),
  )
  return corpus.Corpus(None, (split,), (1.0,), split, ('',), '', ())


def test_the_batches_of_a_run_are_those_of_its_seed_length_ramp_and_steps():
  cfg = tiny.make(train__batch_ramp=((2, 4),), train__num_steps=5, train__seed=3)
  found = list(batches.of_run(cfg, text(), start=1))
  want = list(
    pipeline.train_batches(
      text(),
      seed=3,
      max_seq_len=16,
      batch_sizes=batch_sizes.BatchSizes(8, ((2, 4),)),
      start_step=1,
      num_steps=5,
    )
  )
  assert [b['tokens'].shape for b in found] == [(4, 16), (8, 16), (8, 16), (8, 16)]
  for one, other in zip(found, want, strict=True):
    np.testing.assert_array_equal(one['tokens'], other['tokens'])


def test_on_a_mesh_one_process_has_all_parts_in_order():
  cfg = tiny.make(train__num_steps=2)
  mesh = tiny.mesh(data=4)
  with partitioning.activate(mesh):
    parts = list(batches.of_run(cfg, text(), mesh=mesh))
  whole = list(batches.of_run(cfg, text()))
  for one, other in zip(parts, whole, strict=True):
    np.testing.assert_array_equal(one['tokens'], other['tokens'])
