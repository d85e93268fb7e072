"""Held-out loss, bits per byte and expert balance of a model.

Every token of the held-out documents but their first (begin-of-document) is predicted exactly once,
the end-of-document token included, so bits per byte is a code length for the documents as they lie
on disk: nats / ln 2 / true UTF-8 bytes. Fragments of a document cut by the row length start without
context.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from moe_jax import trees
from moe_jax.balance import expert_similarity, router_stats
from moe_jax.balance import routing_figures as routing_figures_lib
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.models import model_variables, transformer
from moe_jax.processes import agreement
from moe_jax.training import cross_entropy, objective, preference_loss


class StoppedError(Exception):
  """An evaluation was left between two batches, for the signal that it names."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Figures over the whole held-out split."""

  loss: float  # mean cross-entropy per target, nats
  bits_per_byte: float
  routing: dict[str, np.ndarray] | None  # see `routing_figures.figures`; None for a dense model
  # `preference_loss.Figures.means` over the pairs; None without pairs whose reference is known.
  preference: dict[str, float] | None = None

  @property
  def load(self) -> np.ndarray | None:
    """[num_moe_layers, E] int64, tokens per expert; None for a dense model."""
    return None if self.routing is None else self.routing['load']

  @property
  def max_vio_per_layer(self) -> list[float]:
    """MaxVio_global of each MoE layer (arXiv 2408.15664): loads counted over the whole split."""
    return [] if self.routing is None else [float(v) for v in self.routing['max_vio']]

  @property
  def max_vio(self) -> float | None:
    """Mean of `max_vio_per_layer`; None for a dense model."""
    return None if self.routing is None else float(np.mean(self.max_vio_per_layer))

  def __str__(self) -> str:
    text = f'bits_per_byte={self.bits_per_byte:.3f} loss={self.loss:.4f}'
    for name, value in (self.preference or {}).items():
      text += f' {name}={value:.4f}'
    if self.routing is None:
      return text
    layers = ' '.join(f'{value:.2f}' for value in self.max_vio_per_layer)
    return f'{text} max_vio_global={self.max_vio:.2f} (per MoE layer: {layers})'

  def as_dict(self, step: int) -> dict[str, Any]:
    """The stable keys of `evaluate --json`."""
    return {
      'step': step,
      'loss': self.loss,
      'bits_per_byte': self.bits_per_byte,
      'max_vio': self.max_vio,
      'max_vio_per_layer': self.max_vio_per_layer,
      'routing': None if self.routing is None else routing_figures_lib.summary(self.routing),
      **({} if self.preference is None else {'preference': self.preference}),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
  cfg: schema.ModelConfig,
  chunk: int,
  dpo: schema.DpoConfig | None,
  variables: trees.Variables,
  batch: trees.Batch,
):
  """Cross-entropy, targets, routing and, of pairs with a reference, `preference_loss.Figures`."""
  head, targets = transformer.head_of(cfg, variables['params']), batch['targets']
  out = transformer.apply(cfg, variables, batch['tokens'], batch['positions'], batch['segment_ids'])
  if dpo is None:
    found = cross_entropy.head_loss(out.normed, head, targets, chunk=chunk, z_weight=0.0)
    nats, preference = found.cross_entropy, None
  else:
    policy = objective.answer_scores(out.normed, head, batch, chunk)
    reference = preference_loss.per_answer(batch[objective.REFERENCE], batch['segment_ids'])
    preference = preference_loss.sums(dpo, policy, reference)
    nats = -policy.log_probs.sum()
  return nats, (targets >= 0).sum(), out.stats, preference


def evaluate(
  cfg: schema.Config,
  variables: trees.Variables,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
  *,
  progress: bool = False,
  stop_requested: Callable[[], str] = lambda: '',
) -> Evaluation:
  """Runs the model over the held-out split, in order.

  Args:
    cfg: the run; batches have `train.micro_batch_size` (or `batch_size`) rows, and as many more as
      it takes to fill all devices.
    variables: params and router_state, on the mesh.
    corpus: whose `heldout` split is read.
    mesh: devices that share each batch.
    progress: show a bar.
    stop_requested: asked before every batch; the name of a signal, or '' to go on. All processes of
      a run must be told the same.

  Raises:
    StoppedError: `stop_requested` named a signal.
    errors.InputError: there is no held-out row.
  """
  pipeline.check_heldout(corpus, cfg.model.max_seq_len)
  length, ways = cfg.model.max_seq_len, partitioning.row_ways(mesh)
  batch_size = -(-(cfg.train.micro_batch_size or cfg.train.batch_size) // ways) * ways
  batches = pipeline.heldout_batches(corpus, length, batch_size)
  total = -(-pipeline.num_rows(corpus.heldout, length) // batch_size)
  sums: Any = None
  bar = functools.partial(tqdm.tqdm, desc='held-out', unit='batch', leave=False)
  for batch in bar(batches, total=total, disable=None if progress else True):
    if signal_name := stop_requested():
      raise StoppedError(signal_name)
    del batch['domain_ids']
    with partitioning.activate(mesh):
      rows = partitioning.put_global_batch(batch, mesh)
      dpo = cfg.objective.dpo if objective.REFERENCE in batch else None
      found = agreement.fetch(_sums(cfg.model, cfg.train.loss_chunk, dpo, variables, rows))
    # 64 bits: a split may hold more tokens than an int32 counts, or a float32 tells apart.
    found = jax.tree.map(lambda a: a.astype(np.int64 if a.dtype == np.int32 else np.float64), found)
    sums = found if sums is None else jax.tree.map(np.add, sums, found)
  nats, targets, stats, preference = sums
  return Evaluation(
    loss=float(nats / targets),
    bits_per_byte=float(nats / math.log(2) / pipeline.num_bytes(corpus.heldout, length)),
    routing=None if stats is None else routing_figures(cfg.model, variables, stats),
    preference=None if preference is None else preference.means(),
  )


@jax.jit
def _similarity(experts: trees.Tree) -> jax.Array:
  return expert_similarity.expert_similarity(experts['gate_up'], experts['down'])


def routing_figures(
  model: schema.ModelConfig, variables: trees.Variables, stats: router_stats.RouterStats
) -> dict[str, np.ndarray]:
  """`routing_figures.figures` of the sums `stats` over a batch or a whole evaluation."""
  moe, state = (
    model_variables.moe_params(variables['params']),
    model_variables.moe_state(variables['router_state']),
  )
  # Multi-token prediction comes last, and takes part in training only.
  num_layers = len(stats.dropped)
  experts = {k: moe[k][:num_layers] for k in ('gate_up', 'down')}
  state = {k: v[:num_layers] for k, v in state.items()}
  stats, alike, bias = agreement.fetch((stats, _similarity(experts), state.get('expert_bias')))
  return routing_figures_lib.figures(
    model.moe,
    stats,
    embed_dim=model.embed_dim,
    bytes_per_number=np.dtype(jax.numpy.dtype(model.dtype)).itemsize,
    expert_bias=bias,
    similarity=alike,
  )
