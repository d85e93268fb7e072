"""The batches that a run trains on, by its config."""

from collections.abc import Generator

import jax

from moe_jax import trees
from moe_jax.config import batch_sizes, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning


def of_run(
  cfg: schema.Config,
  corpus: corpus_lib.Corpus,
  *,
  mesh: jax.sharding.Mesh | None = None,
  start: int = 0,
  stream: pipeline.StreamStart = pipeline.START,
) -> Generator[trees.HostBatch, None, None]:
  """Yields this process's batches of a run from step `start` on, see `pipeline.train_batches`.

  Args:
    cfg: the run.
    corpus: its text.
    mesh: whose devices share each batch; None: the whole batch is for this process.
    start: first step to yield.
    stream: where the batch sizes took over.
  """
  return pipeline.train_batches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=batch_sizes.of(cfg.train),
    start_step=start,
    num_steps=cfg.train.num_steps,
    stream=stream,
    shards=(0,) if mesh is None else partitioning.row_shards(mesh),
    num_shards=1 if mesh is None else partitioning.row_ways(mesh),
    prefetch=cfg.data.prefetch,
  )
