"""Held-out figures of each domain of a corpus for itself."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.training import evaluate


def by_domain(
  cfg: schema.Config,
  variables: trees.Variables,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
) -> Iterator[tuple[str, evaluate.Evaluation]]:
  """Yields (label, `evaluate.evaluate` of its held-out documents) for every domain that has some.

  Documents of one domain share rows, so what a figure leaves out is only text of other domains. A
  domain none of whose documents fits a row, or is learned, has none.
  """
  length = cfg.model.max_seq_len
  for number, label in enumerate(corpus.domains):
    chosen = np.flatnonzero(corpus.heldout.doc_domain == number)
    if not len(chosen):
      continue
    part = dataclasses.replace(corpus, heldout=subset(corpus.heldout, chosen))
    if pipeline.num_rows(part.heldout, length) and pipeline.num_bytes(part.heldout, length):
      yield label, evaluate.evaluate(cfg, variables, part, mesh)


def subset(split: corpus_lib.TokenSplit, documents: np.ndarray) -> corpus_lib.TokenSplit:
  """The documents of these numbers, [n] int, end to end, with all that is known of them."""
  pieces = [slice(*split.offsets[i : i + 2]) for i in documents]
  lengths = [piece.stop - piece.start for piece in pieces]

  def of_documents(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values[documents]

  learned = split.learned
  return corpus_lib.TokenSplit(
    tokens=np.concatenate([split.tokens[piece] for piece in pieces]),
    offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    doc_bytes=split.doc_bytes[documents],
    doc_domain=split.doc_domain[documents],
    learned=None if learned is None else np.concatenate([learned[piece] for piece in pieces]),
    doc_chosen=of_documents(split.doc_chosen),
    reference=of_documents(split.reference),
  )
