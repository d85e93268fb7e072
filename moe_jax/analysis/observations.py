"""What a checkpoint's routers do with held-out text, token by token: what the probes look at.

Axis letters: X choices or experts. B are all rows that were read, `layers` the MoE layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import trees
from moe_jax.analysis import assignments, interventions
from moe_jax.config import schema
from moe_jax.data import packing, pipeline
from moe_jax.devices import partitioning
from moe_jax.models import transformer


class Observations(NamedTuple):
  """Held-out rows and how they were routed, outside of training."""

  tokens: np.ndarray  # [B, L] int32
  positions: np.ndarray  # [B, L] int32, from 0 where a document or a row begins
  domains: np.ndarray  # [B, L] int32, index into the corpus' domains
  mask: np.ndarray  # [B, L] bool, False = padding
  expert_idx: np.ndarray  # [layers, B, L, K] int32, before drops; E = no expert
  scores: np.ndarray  # [layers, B, L, E] float32, what the balance losses average
  gates: np.ndarray  # [layers, B, L, K] float32, weights of the outputs of `expert_idx`

  @property
  def num_experts(self) -> int:
    return self.scores.shape[-1]

  @property
  def num_layers(self) -> int:
    return len(self.scores)

  def of_tokens(self, values: np.ndarray) -> np.ndarray:
    """[..., B, L, X] or [B, L] of rows -> [..., T, X] or [T] of the T real tokens."""
    if values.ndim == 2:
      return values[self.mask]
    return values[:, self.mask]


@functools.partial(jax.jit, static_argnums=0)
def _routing(model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch) -> Any:
  _, sown = transformer.Transformer(model).apply(
    variables,
    *(batch[key] for key in ('tokens', 'positions', 'segment_ids')),
    row=batch['row'],
    mutable=['intermediates'],
  )
  routing = sown['intermediates']['moe_layers']['moe']
  return tuple(routing[key][0] for key in ('expert_idx', 'scores', 'gates'))


def collect(subject: interventions.Subject, num_tokens: int) -> Observations:
  """Runs about `num_tokens` tokens, in whole rows from all over the held-out split (0 = all).

  Raises:
    errors.InputError: a dense model.
  """
  cfg, corpus = subject.cfg, subject.corpus
  assignments.check(cfg.model)
  length = cfg.model.max_seq_len
  rows = pipeline.rows_of(corpus.heldout, np.arange(corpus.heldout.num_documents), length)
  wanted = min(len(rows), max(1, num_tokens // length)) if num_tokens else len(rows)
  chosen = np.unique(np.linspace(0, len(rows) - 1, wanted).astype(np.int64))
  size = cfg.train.micro_batch_size or cfg.train.batch_size
  parts = []
  for begin in range(0, len(chosen), size):
    batch = packing.stack([rows[i] for i in chosen[begin : begin + size]])
    parts.append(_observe(subject, batch, size))
  joined = [np.concatenate(part, axis=0 if i < 4 else 1) for i, part in enumerate(zip(*parts))]
  return Observations(*joined)


def _observe(subject: interventions.Subject, batch: trees.HostBatch, size: int) -> Observations:
  """One batch, filled up to `size` rows and what devices can share, so that it compiles once."""
  num_rows = len(batch['tokens'])
  inputs = {key: batch[key] for key in ('tokens', 'positions', 'segment_ids')}
  inputs = {key: np.pad(a, ((0, size - num_rows), (0, 0))) for key, a in inputs.items()}
  inputs = assignments.pad_rows(inputs | {'row': np.arange(size, dtype=np.int32)}, subject.mesh)
  with partitioning.activate(subject.mesh):
    put = partitioning.put_global_batch(inputs, subject.mesh)
    routed = jax.device_get(_routing(subject.cfg.model, subject.variables, put))
  expert_idx, scores, gates = (np.asarray(a)[:, :num_rows] for a in routed)
  return Observations(
    batch['tokens'],
    batch['positions'],
    batch['domain_ids'],
    batch['segment_ids'] > 0,
    expert_idx,
    scores.astype(np.float32),
    gates.astype(np.float32),
  )
