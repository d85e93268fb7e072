"""Measures what the routing of a checkpoint tells the past about the future.

Held-out rows are run twice: as they are, and with the second half of each replaced by the second
half of the next one. In a causal model the first half cannot tell the difference; where experts
choose tokens, it can (arXiv 2408.15664, section 5).

Axis letters are those of `moe_jax.models`.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.analysis import assignments, leakage
from moe_jax.config import router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import packing, pipeline
from moe_jax.devices import partitioning
from moe_jax.runs import overrides, trained_run
from moe_jax.training import evaluate


@dataclasses.dataclass(frozen=True)
class Probe:
  """What changed in the first halves, whose own text is the same in both runs."""

  num_tokens: int  # in first halves
  changed: np.ndarray  # [layers] float64, share of these whose set of experts differs
  log_likelihood_change: float  # nats, mean absolute over the targets predicted there


def probe(run: trained_run.Run, corpus: corpus_lib.Corpus) -> Probe:
  """Runs all whole rows of the held-out split in both forms.

  Raises:
    errors.InputError: a dense model, or less than two whole rows.
  """
  assignments.check(run.cfg.model)
  tokens, targets, change, changed = 0, 0, 0.0, np.zeros(run.cfg.model.num_moe_layers)
  for before, after in _pairs(run.cfg, corpus, run.mesh):
    choices, moved = _compare(run, before, after)
    mask = _first_half(before['segment_ids'] > 0)
    shares = [
      leakage.changed_assignments(a[None], b[None], mask) for a, b in zip(*choices, strict=True)
    ]
    changed += np.array(shares) * mask.sum()
    tokens += int(mask.sum())
    targets += int(_first_half(before['targets'] >= 0).sum())
    change += moved
  return Probe(tokens, changed / tokens, change / targets)


def _first_half(mask: np.ndarray) -> np.ndarray:
  """[B, L] bool, the part of `mask` in the first half of each row."""
  return mask & (np.arange(mask.shape[1]) < mask.shape[1] // 2)


def _pairs(
  cfg: schema.Config, corpus: corpus_lib.Corpus, mesh: jax.sharding.Mesh
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
  """Batches of rows as they are, and with another second half; of the size that evaluation uses."""
  length = cfg.model.max_seq_len
  heldout = corpus.heldout
  rows = pipeline.rows_of(heldout, np.arange(heldout.num_documents), length)
  whole = len(rows) - (rows[len(rows) - 1]['segment_ids'][-1] == 0)
  errors.require(
    whole >= 2 and length >= 2,
    f'the held-out text makes {whole} whole rows of config.model.max_seq_len={length}, and the '
    'probe needs two rows, of two tokens at least; raise config.data.heldout_fraction',
  )
  ways = partitioning.row_ways(mesh)
  size = -(-(cfg.train.micro_batch_size or cfg.train.batch_size) // ways) * ways
  for begin in range(0, whole, size):
    numbers = range(begin, min(begin + size, whole))
    fill = [packing.padding_row(length)] * (size - len(numbers))
    before = [rows[i] for i in numbers]
    after = [splice(rows[i], rows[(i + 1) % whole]) for i in numbers]
    yield packing.stack(before + fill), packing.stack(after + fill)


def splice(row: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The first half of `row` and the second half of `other`, which begins a document of its own.

  Arrays are [L] int32. The last target of the first half stays what it was in `row`.
  """
  half = len(row['tokens']) // 2
  # A document that went on across the middle of `other` has late positions from its first token on:
  # under an id of the first half it would be attended to by the past.
  shift = {'segment_ids': row['segment_ids'].max()}
  return {
    key: np.concatenate([row[key][:half], other[key][half:] + shift.get(key, 0)])
    for key in packing.KEYS
  }


def _compare(
  run: trained_run.Run, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> tuple[list[np.ndarray], float]:
  """Choices [layers, B, L, K] of both runs, and the summed absolute change of log-likelihoods."""
  targets = np.where(_first_half(before['targets'] >= 0), before['targets'], -1)
  rows = np.arange(len(targets), dtype=np.int32)
  outputs = []
  for batch in (before, after):
    inputs = {key: batch[key] for key in ('tokens', 'positions', 'segment_ids')}
    inputs |= {'row': rows, 'targets': targets}
    with partitioning.activate(run.mesh):
      put = partitioning.put_global_batch(inputs, run.mesh)
      outputs.append(jax.device_get(_outcome(run.cfg.model, run.variables, put)))
  (choices, likelihood), (other_choices, other_likelihood) = outputs
  moved = np.abs(likelihood.astype(np.float64) - other_likelihood).sum()
  return [choices, other_choices], float(moved)


@functools.partial(jax.jit, static_argnums=0)
def _outcome(
  model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch
) -> tuple[jax.Array, jax.Array]:
  """Choices [layers, B, L, K] and log-likelihoods [B, L] float32, 0 where there is no target."""
  logits, expert_idx = assignments.apply(model, variables, batch)
  targets = batch['targets']
  label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  likelihood = label - jax.nn.logsumexp(logits, axis=-1)
  return expert_idx, jnp.where(targets >= 0, likelihood, 0.0)


def theory(model: schema.ModelConfig) -> dict[str, float] | None:
  """Bits about the future that the allocation can carry, where experts take a number of tokens.

  None for a causal router, and for one whose experts take no fixed number of a chunk's tokens.

  Keys: bits_per_token_per_layer and lower_bound of one layer, bits_per_token of all MoE layers.
  """
  moe = model.moe
  traits = router_traits.of(moe)
  if traits.causal or not (traits.bound and traits.bound.exact):
    return None
  tokens = traits.bound.chunk(moe, model.max_seq_len)
  bits = leakage.bits_of(moe.num_experts, traits.bound.room(moe, tokens), tokens)
  active = traits.active_experts(moe, False)
  return {
    'bits_per_token_per_layer': bits,
    'lower_bound': leakage.lower_bound(moe.num_experts, active),
    'bits_per_token': bits * model.num_moe_layers,
  }


def heldout_losses(run: trained_run.Run, corpus: corpus_lib.Corpus) -> dict[str, float]:
  """Held-out loss in nats per target, `as_trained` and, if chunks can be, `shuffled`.

  Shuffling deals the tokens to chunks at random; the loss that it costs was leakage, or the habit
  of it.
  """
  variants = {'as_trained': {}}
  if 'shuffle_chunks' in router_traits.of(run.cfg.model.moe).options:
    variants['shuffled'] = {'model.moe.options.shuffle_chunks': True}
  losses = {}
  for name, values in variants.items():
    cfg = overrides.changed(run.cfg, values)
    losses[name] = evaluate.evaluate(cfg, run.variables, corpus, run.mesh, progress=True).loss
  return losses
