"""What a text costs the second time that it is said: how well a model copies from its context.

Small decoders learn this late and all at once, as heads form that look for what followed the
present token before (induction heads, Olsson et al., arXiv 2209.11895). Runs that differ in their
seed alone may lie on either side of that step, and their losses with them.

Rows are made of held-out text: half a row, and the same half again.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import trees
from moe_jax.analysis import assignments, interventions
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.processes import agreement
from moe_jax.training import cross_entropy

ROWS = 64


class Copying(NamedTuple):
  """Mean cross-entropy in nats per token, of the same tokens."""

  first: float
  second: float

  @property
  def saved(self) -> float:
    """Nats per token that the repetition saves; near 0 for a model that does not copy."""
    return self.first - self.second


def measure(subject: interventions.Subject, num_rows: int = ROWS) -> Copying | None:
  """What pieces of held-out text cost when they are said, and said again.

  The first token of a piece is left out: the second time nothing announces it.

  Args:
    subject: the model and its text.
    num_rows: pieces, from all over the held-out split; fewer where there are not as many.

  Returns:
    None without a held-out document that is longer than half a row.
  """
  half, length = subject.cfg.model.max_seq_len // 2, subject.cfg.model.max_seq_len
  chosen = pieces(subject.corpus.heldout, half, num_rows)
  if not len(chosen):
    return None
  size = subject.cfg.train.micro_batch_size or subject.cfg.train.batch_size
  parts = [_losses(subject, rows(part, length), size) for part in _parts(chosen, size)]
  found = np.concatenate(parts).astype(np.float64)  # [pieces, L]
  return Copying(found[:, : half - 1].mean(), found[:, half : 2 * half - 1].mean())


def pieces(split: corpus_lib.TokenSplit, size: int, most: int) -> np.ndarray:
  """[n, size] int32: runs of so many tokens within a document, without the tokens at its ends."""
  starts = [
    start
    for begin, end in zip(split.offsets[:-1], split.offsets[1:])
    for start in range(int(begin) + 1, int(end) - size, size)
  ]
  wanted = min(len(starts), most)
  chosen = np.unique(np.linspace(0, len(starts) - 1, wanted).astype(np.int64))
  found = [split.tokens[starts[i] : starts[i] + size] for i in chosen]
  return np.asarray(found, np.int32).reshape(-1, size)


def rows(chosen: np.ndarray, length: int) -> trees.HostBatch:
  """Batch [n, L] int32 of pieces [n, L // 2] that are said twice; an odd place is left empty."""
  num, half = chosen.shape
  tokens = np.concatenate([chosen, chosen], axis=1)
  targets = np.full_like(tokens, -1)
  targets[:, :-1] = tokens[:, 1:]
  targets[:, half - 1] = -1
  room = ((0, 0), (0, length - 2 * half))
  return {
    'tokens': np.pad(tokens, room),
    'targets': np.pad(targets, room, constant_values=-1),
    'positions': np.broadcast_to(np.arange(length, dtype=np.int32), (num, length)).copy(),
    'segment_ids': np.pad(np.ones_like(tokens), room),
  }


def _parts(chosen: np.ndarray, size: int) -> list[np.ndarray]:
  return [chosen[i : i + size] for i in range(0, len(chosen), size)]


def _losses(subject: interventions.Subject, batch: trees.HostBatch, size: int) -> np.ndarray:
  """[n, L] nats of one batch, filled up to `size` rows and what devices can share."""
  num = len(batch['tokens'])
  filled = {
    key: np.pad(a, ((0, size - num), (0, 0)), constant_values=-1 if key == 'targets' else 0)
    for key, a in batch.items()
  }
  filled = assignments.pad_rows(filled, subject.mesh)
  with partitioning.activate(subject.mesh):
    put = partitioning.put_global_batch(filled, subject.mesh)
    chunk = subject.cfg.train.loss_chunk
    found = _log_probs(subject.cfg.model, chunk, subject.variables, put)
    whole = agreement.fetch(found)
  return -whole[:num]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probs(
  model: schema.ModelConfig, chunk: int, variables: trees.Variables, batch: trees.Batch
) -> jax.Array:
  inputs = (batch[key] for key in ('tokens', 'positions', 'segment_ids'))
  out = transformer.apply(model, variables, *inputs)
  head = transformer.head_of(model, variables['params'])
  return cross_entropy.token_log_probs(out.normed, head, batch['targets'], chunk=chunk)
