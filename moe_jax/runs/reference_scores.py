"""Log-probabilities of a run's pairs of answers under its reference, the model it starts from.

They are computed once, before the first step, in evaluation mode (no noise, no drops), and kept in
workdir/reference.npz; so no second model lies in memory while a run trains.
Each row of pairs carries its own, see `data.whole_documents`.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import tqdm

from moe_jax import atomic_files, errors, trees
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import npz_files, packing, whole_documents
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.processes import agreement
from moe_jax.training import objective

FILE = 'reference.npz'


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
  model: schema.ModelConfig, chunk: int, variables: trees.Variables, batch: trees.Batch
) -> jax.Array:
  out = transformer.apply(
    model, variables, batch['tokens'], batch['positions'], batch['segment_ids']
  )
  head = transformer.head_of(model, variables['params'])
  return objective.answer_scores(out.normed, head, batch, chunk).log_probs


def measure(
  cfg: schema.Config,
  variables: trees.Variables,
  mesh: jax.sharding.Mesh,
  split: corpus_lib.TokenSplit,
) -> np.ndarray:
  """[n, 2] float32, log-probabilities of the chosen and the rejected answer of every pair, in nats.

  Pairs that no row has room for, which are never trained on, get 0.

  Args:
    cfg: the run.
    variables: params and router_state of the reference, on the mesh.
    mesh: devices that share each batch.
    split: of preferences.
  """
  found = np.zeros((split.num_documents, 2), np.float32)
  rows = whole_documents.WholeDocuments(
    split, np.arange(split.num_documents), cfg.model.max_seq_len
  )
  ways = partitioning.row_ways(mesh)
  size = -(-(cfg.train.micro_batch_size or cfg.train.batch_size) // ways) * ways
  bar = functools.partial(tqdm.tqdm, desc='reference', unit='batch', leave=False)
  for begin in bar(range(0, len(rows), size), disable=None if agreement.is_first() else True):
    here = range(begin, min(begin + size, len(rows)))
    empty = [rows.padding_row()] * (size - len(here))
    batch = objective.inputs(packing.stack([rows[i] for i in here] + empty))
    batch.pop(objective.REFERENCE, None)
    with partitioning.activate(mesh):
      put = partitioning.put_global_batch(batch, mesh)
      scores = agreement.fetch(_scores(cfg.model, cfg.train.loss_chunk, variables, put))
    for row, i in enumerate(here):
      documents = rows.documents(i)
      found[documents] = scores[row, : len(documents)]
  return found


def prepared(
  cfg: schema.Config,
  workdir: pathlib.Path,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
  reference: Callable[[], trees.Variables],
  *,
  anew: bool,
  write: bool,
) -> corpus_lib.Corpus:
  """The corpus with the reference's log-probabilities; the same one where none are needed.

  Args:
    cfg: the run.
    workdir: where they are kept.
    corpus: of the run.
    mesh: devices that share each batch.
    reference: gives the weights that the run started from; called only where they are needed.
    anew: the run is at its beginning, so what an earlier one has left there is not read.
    write: whether this process writes the file.

  Raises:
    errors.InputError: the weights are needed, and are not where the run started from.
  """
  if cfg.objective.kind != 'dpo':
    return corpus
  with agreement.together():
    found = None if anew else attached(cfg, workdir, corpus)
  lacking = ['no' if found is None else '']
  if jax.process_count() > 1:  # each may have a workdir of its own; all compute, or none
    lacking = agreement.texts(lacking[0])
  if found is not None and not any(lacking):
    return found
  variables = reference()
  scores = [measure(cfg, variables, mesh, split) for split in (*corpus.train, corpus.heldout)]
  with agreement.together():
    finite = all(np.isfinite(array).all() for array in scores)
    errors.require(
      finite,
      f'config.init_from={cfg.init_from} gives a log-probability that is not finite; start from '
      'weights that are whole',
    )
    if write:
      _write(workdir / FILE, _key(cfg, corpus), scores)
  return _with(corpus, scores)


def attached(
  cfg: schema.Config, workdir: pathlib.Path, corpus: corpus_lib.Corpus
) -> corpus_lib.Corpus | None:
  """The corpus with the log-probabilities in a workdir; None where they are of other pairs.

  Raises:
    errors.InputError: the file is damaged.
  """
  path = workdir / FILE
  if not path.is_file():
    return None
  try:
    if str(npz_files.read(path, 'key')) != _key(cfg, corpus):
      return None
    splits = (*corpus.train, corpus.heldout)
    scores = [npz_files.read(path, f'split{i}') for i in range(len(splits))]
    fit = all(s.shape == (split.num_documents, 2) for s, split in zip(scores, splits))
    if not fit or not all(np.isfinite(s).all() for s in scores):
      raise ValueError('they are not of these pairs, or not finite')
  except npz_files.DAMAGE as e:
    raise errors.InputError(
      f'{path} must hold the log-probabilities of the reference ({e}); remove it, and they are '
      'computed again from config.init_from'
    ) from e
  return _with(corpus, scores)


def _with(corpus: corpus_lib.Corpus, scores: list[np.ndarray]) -> corpus_lib.Corpus:
  splits = [
    dataclasses.replace(split, reference=array)
    for split, array in zip((*corpus.train, corpus.heldout), scores)
  ]
  return dataclasses.replace(corpus, train=tuple(splits[:-1]), heldout=splits[-1])


def _key(cfg: schema.Config, corpus: corpus_lib.Corpus) -> str:
  """What tells the pairs that were measured from others: longer rows have room for more of them."""
  return f'{corpus.fingerprint} {cfg.model.max_seq_len}'


def _write(path: pathlib.Path, key: str, scores: list[np.ndarray]):
  """Writes the file, whole or not at all."""
  arrays = {f'split{i}': array for i, array in enumerate(scores)}
  buffer = io.BytesIO()
  arrays['key'] = np.array(key)
  # pyright: ignore is for a key that would be savez's own option; none is.
  np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
  atomic_files.write_bytes(path, buffer.getvalue())
