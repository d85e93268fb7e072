"""Loss of a batch, of next tokens, preferences or rewards, and balance; its gradients, exact under
accumulation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.balance import loss_scopes, router_stats
from moe_jax.config import moe_config, schema
from moe_jax.models import model_variables, transformer
from moe_jax.training import cross_entropy as cross_entropy_lib
from moe_jax.training import lora, policy_loss, preference_loss, trainable, value_head

Array = jax.Array
Batch = dict[str, Array]

BATCH_KEYS = ('tokens', 'targets', 'positions', 'segment_ids')
REFERENCE = 'reference'  # of batches of preferences, see `whole_documents`


class Loss(NamedTuple):
  """Shares of a (micro-)batch; they add up to the values of the whole batch."""

  main: Array  # [] float32, cross-entropy per target, loss per pair of preferences, or of a policy
  mtp: Array | None  # [] float32, cross-entropy of multi-token prediction, mean over its depths
  aux: Array  # [] float32, weighted sum of the balance losses
  stats: router_stats.RouterStats | None  # leaves [MoE layers, ...], multi-token prediction's last
  # Sums over pairs of preferences, or over tokens of answers.
  figures: preference_loss.Figures | policy_loss.Figures | None = None


class Totals(NamedTuple):
  """Denominators of the whole batch."""

  targets: Array  # [] int32, real targets, of the cross-entropy
  tokens: Array  # [] int32, real tokens, of the balance losses
  pairs: Array | int = 1  # [] int32, of preferences
  chosen: Array | int = 1  # [] int32, targets in their chosen answers


def totals_of(cfg: schema.Config, batch: Batch) -> Totals:
  """Denominators of a global batch; none is 0."""
  targets, segments = batch['targets'] >= 0, batch['segment_ids']
  counts = [targets.sum(), (segments > 0).sum()]
  if cfg.objective.kind == 'dpo':
    counts += [(segments.max(axis=1) // 2).sum(), (targets & (segments % 2 == 1)).sum()]
  return Totals(*(jnp.maximum(count, 1) for count in counts))


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays of a batch that the loss reads."""
  keys = (*BATCH_KEYS, REFERENCE, *policy_loss.KEYS)
  return {key: batch[key] for key in keys if key in batch}


def batch_loss(
  cfg: schema.Config,
  params: trees.Params,
  router_state: trees.RouterState,
  batch: Batch,
  seed: Array,
  totals: Totals,
  slopes: Mapping[str, Any] | None = None,
  mtp_weight: Array | None = None,
) -> tuple[Array, Loss]:
  """This (micro-)batch's share of the loss of the whole batch.

  Args:
    cfg: the run.
    params: weights.
    router_state: what routing remembers.
    batch: tokens, targets, positions, segment_ids, each [B, L] int32, and row [B] int32, the rows'
      numbers in the whole batch; of preferences also reference [B, L] float32, of answers with
      rewards those of `policy_loss.KEYS`.
    seed: [] uint32, decides the random choices of routing in this step.
    totals: of the whole batch.
    slopes: `loss_scopes.global_slopes` of the whole batch, when this is only a part of it.
    mtp_weight: lambda of multi-token prediction; None is `train.mtp_loss_weight`.

  Returns:
    (the loss that is minimised, its parts).
  """
  out = transformer.apply(
    cfg.model,
    {'params': params, 'router_state': router_state},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    train=True,
    targets=batch['targets'],
    row=batch['row'],
    seed=seed,
    slopes=slopes,
    experts=recorded_experts(batch),
    stage_micro_batches=cfg.mesh.stage_micro_batches,
  )
  head = transformer.head_of(cfg.model, params)
  head_loss = functools.partial(cross_entropy_lib.head_loss, head=head, chunk=cfg.train.loss_chunk)
  figures, mtp, stats = None, None, out.stats
  if cfg.objective.kind == 'dpo':
    total, main, figures = _preference_loss(cfg, head, out.normed, batch, totals)
  elif cfg.objective.kind == 'policy':
    with jax.named_scope('policy_loss'):
      policy, targets = cfg.objective.policy, batch['targets']
      log_probs = policy_log_probs(
        out.normed, head, targets, temperature=policy.temperature, chunk=cfg.train.loss_chunk
      )
      values = (
        value_head.values(params[value_head.KEY], out.normed) if value_head.KEY in params else None
      )
      total, figures = policy_loss.sums(
        policy, log_probs, targets, batch['segment_ids'], batch, values
      )
    main = total
  else:
    with jax.named_scope('head_loss'):
      found = head_loss(out.normed, targets=batch['targets'], z_weight=cfg.train.z_loss_weight)
    total, main = found.total / totals.targets, found.cross_entropy / totals.targets
  if out.mtp is not None:
    with jax.named_scope('mtp_loss'):
      # Over the targets of the main model too, though the last tokens have none (V3, Eq. 24-25).
      depths = [
        head_loss(normed, targets=targets, z_weight=0.0).total
        for normed, targets in zip(out.mtp.normed, out.mtp.targets)
      ]
    mtp = sum(depths) / (len(depths) * totals.targets)
    total += (cfg.train.mtp_loss_weight if mtp_weight is None else mtp_weight) * mtp
    if stats is not None:
      stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stats, out.mtp.stats)
  if stats is None:
    return total, Loss(main, mtp, jnp.float32(0), None, figures)
  aux = aux_loss(cfg.model.moe, model_variables.moe_state(router_state), stats) / totals.tokens
  return total + aux, Loss(main, mtp, aux, stats, figures)


def _preference_loss(
  cfg: schema.Config, head: Array, normed: Array, batch: Batch, totals: Totals
) -> tuple[Array, Array, preference_loss.Figures]:
  """(what is minimised, the loss of the pairs, its figures), shares of the whole batch."""
  with jax.named_scope('preference_loss'):
    policy = answer_scores(normed, head, batch, cfg.train.loss_chunk)
    reference = preference_loss.per_answer(batch[REFERENCE], batch['segment_ids'])
    figures = preference_loss.sums(cfg.objective.dpo, policy, reference)
    total = main = figures.loss / totals.pairs
    if cfg.objective.dpo.sft_weight:
      total -= cfg.objective.dpo.sft_weight * policy.log_probs[..., 0].sum() / totals.chosen
  return total, main, jax.lax.stop_gradient(figures)


def answer_scores(
  normed: Array, head: Array, batch: Mapping[str, Array], chunk: int
) -> preference_loss.Answers:
  """Log-probabilities of the answers in a batch of preferences.

  Args:
    normed: [B, L, D] hidden states before the head.
    head: [D, V].
    batch: targets and segment_ids, [B, L] int32.
    chunk: see `cross_entropy.token_log_probs`.
  """
  targets = batch['targets']
  log_probs = cross_entropy_lib.token_log_probs(normed, head, targets, chunk=chunk)
  return preference_loss.answers(log_probs, targets, batch['segment_ids'])


def policy_log_probs(
  normed: Array, head: Array, targets: Array, *, temperature: float, chunk: int
) -> Array:
  """Log-probabilities of a policy's tokens as it samples them: [B, L] float32.

  Args:
    normed: [B, L, D] hidden states before the head.
    head: [D, V].
    targets: [B, L] int32; -1 where nothing is learned.
    temperature: that logits are divided by.
    chunk: see `cross_entropy.token_log_probs`.
  """
  return cross_entropy_lib.token_log_probs(
    normed, head, targets, chunk=chunk, temperature=temperature
  )


def recorded_experts(batch: Mapping[str, Array]) -> Array | None:
  """The choices that a batch brings, [MoE layers, B, L, K] int32; None where it brings none."""
  found = batch.get(policy_loss.EXPERTS)
  return None if found is None else jnp.moveaxis(found, 2, 0).astype(jnp.int32)


def aux_loss(
  moe: moe_config.MoEConfig, state: Mapping[str, Array], stats: router_stats.RouterStats
) -> Array:
  """Weighted sum over losses and layers of the balance losses, times the number of tokens."""
  total = jnp.float32(0)
  for name, values in stats.losses.items():
    weight = moe.loss(name).weight
    if name == moe.balance.adaptive.loss:
      weight = state['loss_coefficient']
    elif not weight:
      continue
    total += (weight * values).sum()
  return total


def _split(batch: Batch, num_micro: int) -> Batch:
  """[B, ...] -> [num_micro, B / num_micro, ...].

  Micro-batch i takes rows i, i + n, i + 2n ...: every device keeps its own rows.
  """
  return jax.tree.map(lambda x: x.reshape(-1, num_micro, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulate(share: Callable[[Batch], Any], micros: Batch) -> Any:
  """The sum of share(micro) over the micro-batches; floats add up in float32.

  Sums of bfloat16 gradients would lose the small ones.
  """
  shapes = jax.eval_shape(share, jax.tree.map(lambda x: x[0], micros))

  def wide(dtype):
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype

  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)

  def add(total, micro):
    return (jax.tree.map(jnp.add, total, share(micro)), None)

  return jax.lax.scan(add, zeros, micros)[0]


def gradients(
  cfg: schema.Config,
  params: trees.Params,
  router_state: trees.RouterState,
  batch: Batch,
  seed: Array,
  mtp_weight: Array | None = None,
) -> tuple[Loss, Any]:
  """(loss, gradients) of a global batch, accumulated over micro-batches if asked.

  The gradients are those of the trained weights, as `trainable.select` has them.
  `mtp_weight` is lambda of multi-token prediction; None is `train.mtp_loss_weight`.

  A balance loss over the whole batch is no sum over its parts. With accumulation a first, forward
  pass then counts, and the second adds up the exact gradient from it (`loss_scopes.global_slopes`).
  """
  batch = {**batch, 'row': jnp.arange(len(batch['tokens']), dtype=jnp.int32)}
  totals = totals_of(cfg, batch)
  loss_fn = functools.partial(batch_loss, cfg)

  def share(micro: Batch, slopes: Any = None) -> tuple[Loss, Any]:
    def loss_of(leaves: trees.Params) -> tuple[Array, Loss]:
      whole = lora.merged(trainable.overlaid(params, leaves))
      return loss_fn(whole, router_state, micro, seed, totals, slopes, mtp_weight)

    # Of whole leaves: no copy of the kernels is made for the rows of them that are trained.
    grad_fn = jax.value_and_grad(loss_of, has_aux=True)
    (_, loss), grads = grad_fn(trainable.leaves(cfg, params))
    return loss, trainable.rows(cfg, grads)

  num_micro = len(batch['tokens']) // (cfg.train.micro_batch_size or len(batch['tokens']))
  if num_micro == 1:
    return share(batch)
  micros, slopes = _split(batch, num_micro), None
  if _counts_first(cfg.model):

    def count(micro):
      return loss_fn(lora.merged(params), router_state, micro, seed, totals)[1].stats

    slopes = loss_scopes.global_slopes(cfg.model.moe, _accumulate(count, micros))
  loss, grads = _accumulate(functools.partial(share, slopes=slopes), micros)
  if loss.stats is not None:
    stats = loss_scopes.refreshed(cfg.model.moe, loss.stats)
    aux = aux_loss(cfg.model.moe, model_variables.moe_state(router_state), stats) / totals.tokens
    loss = loss._replace(stats=stats, aux=aux)
  dtypes = trainable.leaves(cfg, params)
  return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, dtypes)


def _counts_first(model: schema.ModelConfig) -> bool:
  """Whether a loss that is minimised averages over the whole batch."""

  def minimised(name):
    return model.moe.loss(name).weight or name == model.moe.balance.adaptive.loss

  return model.is_moe and any(
    model.moe.loss(name).scope == 'global_batch' and minimised(name) for name in moe_config.LOSSES
  )
