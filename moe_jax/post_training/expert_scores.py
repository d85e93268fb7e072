"""How much a task uses each routed expert: ESFT's two scores (arXiv 2407.01906, section 3).

The model reads text as it stands, prompts and answers, in evaluation mode and without drops,
whatever its config says of them: what a layer drops would change what later ones choose. The token
score of an expert is the share of choices that fall on it, 1[g > 0] / K, so a layer's add up
to 1; its gate score is the mean gate that it gets, so a layer's add up to the gate mass that the K
best keep: below 1 without `norm_topk_prob`, and p is then an absolute mass, not a share of it.
`routed_scaling_factor` is left out, which the paper's model has at 1: it would scale p.
Means are over tokens, as in the released scores; the paper's mean over sequences is the same where
all are of one length.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import batch_sizes, router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.post_training import expert_selection
from moe_jax.runs import trained_run

Array = jax.Array
_INPUTS = ('tokens', 'positions', 'segment_ids')


def check(model: schema.ModelConfig):
  """Refuses models whose tokens do not choose K experts each.

  Raises:
    errors.InputError: a dense model, or a router without a ranking of K choices per token.
  """
  errors.require(
    model.is_moe and router_traits.of(model.moe).ranked,
    f'config.model.moe.router={model.moe.router!r} with num_experts={model.moe.num_experts}: ESFT '
    'scores the K choices that every token makes; use a model whose tokens choose experts',
  )


def _without_drops(model: schema.ModelConfig) -> schema.ModelConfig:
  """The model with every choice computed outside of training, on any mesh."""
  moe = dataclasses.replace(
    model.moe,
    capacity=dataclasses.replace(model.moe.capacity, at_eval=False),
    exchange=dataclasses.replace(model.moe.exchange, buffer_factor=0.0),
  )
  return dataclasses.replace(model, moe=moe)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
  model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch
) -> tuple[Array, Array]:
  """Choices and gates per expert over the real tokens, both [layers, E] float32."""
  sown: Any = transformer.Transformer(model).apply(
    variables, *(batch[key] for key in _INPUTS), row=batch['row'], mutable=['intermediates']
  )
  routing = sown[1]['intermediates']['moe_layers']['moe']
  experts, gates = routing['expert_idx'][0], routing['gates'][0]  # [layers, B, L, K]
  real = (batch['segment_ids'] > 0)[None, ..., None]
  # Index E, no expert, and padding fall out.
  one_hot = jax.nn.one_hot(jnp.where(real, experts, model.moe.num_experts), model.moe.num_experts)
  chosen = one_hot * (gates > 0)[..., None]
  mass = (one_hot * gates[..., None]).sum((1, 2, 3))
  return chosen.sum((1, 2, 3)), mass / model.moe.routed_scaling_factor


def score(
  run: trained_run.Run, cfg: schema.Config, corpus: corpus_lib.Corpus, tokens: int
) -> expert_selection.ExpertScores:
  """Scores of a run's experts over the first training rows of a corpus.

  Args:
    run: whose experts they are.
    cfg: how long the rows are, how many are read together, and the seed of their order.
    corpus: in ids of the run's own tokenizer.
    tokens: that are read, about.

  Raises:
    errors.InputError: see `check`.
  """
  check(run.cfg.model)
  ways, length = partitioning.row_ways(run.mesh), cfg.model.max_seq_len
  rows = -(-cfg.train.batch_size // ways) * ways
  steps = -(-tokens // (rows * length))
  batches = pipeline.train_batches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=length,
    batch_sizes=batch_sizes.BatchSizes(rows),
    start_step=0,
    num_steps=steps,
  )
  return measure(run.cfg.model, run.variables, run.mesh, itertools.islice(batches, steps))


def measure(
  model: schema.ModelConfig,
  variables: trees.Variables,
  mesh: jax.sharding.Mesh,
  batches: Iterable[trees.HostBatch],
) -> expert_selection.ExpertScores:
  """Scores over the real tokens of batches.

  Args:
    model: see `check`.
    variables: params and router_state, on the mesh.
    mesh: devices that share each batch, whose rows they must divide.
    batches: tokens, positions and segment_ids, [B, L] int32 each.

  Raises:
    errors.InputError: see `check`; or there is no token.
  """
  check(model)
  model = _without_drops(model)
  shape = (model.num_moe_layers, model.moe.num_experts)
  chosen, gates, num_tokens = np.zeros(shape), np.zeros(shape), 0
  for batch in batches:
    inputs = {key: batch[key] for key in _INPUTS}
    inputs['row'] = np.arange(len(batch['tokens']), dtype=np.int32)
    with partitioning.activate(mesh):
      put = partitioning.put_global_batch(inputs, mesh)
      more = jax.device_get(_sums(model, variables, put))
    chosen += np.asarray(more[0], np.float64)
    gates += np.asarray(more[1], np.float64)
    num_tokens += int((batch['segment_ids'] > 0).sum())
  errors.require(num_tokens > 0, 'there is no token to score experts by; give more text')
  per_token = model.moe.num_experts_per_tok
  return expert_selection.ExpertScores(
    chosen / (num_tokens * per_token), gates / num_tokens, num_tokens, model.num_dense_layers
  )
