"""Loss of a policy on answers of its own, by their advantages: GRPO (arXiv 2402.03300, equation 3).

With the ratio r_t = p(o_t) / p_old(o_t) of policy and sampler and the advantage A_t of a token,

  loss = sum_t w_t (-min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + beta KL_t)

where the weights w_t are those of the aggregation (`weights_of`) over the whole batch: they are
made before it is cut into micro-batches and shards, so these change nothing. The distance to the
reference q is estimated per token from d = log q - log p: k3 = exp(d) - d - 1, whose gradient is on
average that of KL(q || p), or k2 = d^2 / 2, that of KL(p || q). k1 = -d has no use as a loss: the
mean of its gradient is 0, and q has no part in it.

PPO (`objective.policy.algorithm='ppo'`) has no such term: its distance is in the rewards, -beta
(log p_old - log q) per token (arXiv 2402.03300, equation 2), and its advantages come from a value
head v. To its loss that of the value is added, with the return R and the sampler's value v_old,

  value_weight sum_t w_t max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2) / 2.

GSPO's ratio (arXiv 2507.18071) is that of a whole answer, the exponential of the mean log-ratio of
its tokens: a change of experts moves single tokens, not their mean.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import schema

Array = jax.Array

# Arrays of a batch beside its tokens, [B, L] float32; REFERENCE only with a reference, RETURNS and
# VALUES only with a value head, and EXPERTS [B, L, MoE layers, K] int32 only with replayed routing.
ADVANTAGES, WEIGHTS, OLD = 'advantages', 'weights', 'old_log_probs'
REFERENCE, EXPERTS = 'reference_log_probs', 'experts'
RETURNS, VALUES = 'returns', 'old_values'
KEYS = (ADVANTAGES, WEIGHTS, OLD, REFERENCE, EXPERTS, RETURNS, VALUES)
MAX_LOG_RATIO = 20.0  # beyond which exp(log q - log p) is held


class Figures(NamedTuple):
  """Sums over the tokens of answers, each [] float32; those of micro-batches add up."""

  tokens: Array
  clipped: Array  # tokens whose gradient the clipping takes away
  kl: Array  # k3, nats
  ratio: Array  # p / p_old
  # Of PPO only; None has no leaf.
  value_loss: Array | None = None  # clipped, halved squares, without weight
  value_clipped: Array | None = None  # tokens whose value loss is that of the clipped value

  def means(self) -> dict[str, float]:
    """Means over tokens by name; of sums fetched from the devices."""
    tokens = max(float(self.tokens), 1.0)
    found = {
      'clip_share': float(self.clipped) / tokens,
      'reference_kl': float(self.kl) / tokens,
      'ratio': float(self.ratio) / tokens,
    }
    if self.value_loss is None or self.value_clipped is None:
      return found
    more = zip(PPO_FIGURES, (self.value_loss, self.value_clipped))
    return found | {name: float(total) / tokens for name, total in more}


FIGURES = tuple(Figures(*[0.0] * 4).means())  # type: ignore[list-item]
PPO_FIGURES = ('value_loss', 'value_clip_share')
# What is known of an iteration of PPO beside `ROLLOUT_FIGURES`, by `post_training.value_targets`.
PPO_ROLLOUT_FIGURES = ('explained_variance', 'advantage_mean', 'return_mean')
# What is known of the answers of an iteration, by `post_training.policy_batches` and
# `post_training.policy_stage`.
ROLLOUT_FIGURES = (
  'reward',
  'right_share',
  'answer_tokens',
  'ended_share',
  'entropy',
  'equal_groups',
  'sampler_log_ratio',
  'sampler_log_ratio_max',
  'sampler_k3',
  'experts_differ',
  'sampler_max_vio',
  'rollout_seconds',
  'rollout_tokens_per_second',
  'reward_wait_share',
)


def weights_of(aggregation: str, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:
  """Weight of every token of each answer in the loss, [n] float64.

  Args:
    aggregation: 'sequence_mean' is the mean over answers of the mean over their tokens (GRPO),
      'token_mean' the mean over all tokens (DAPO, arXiv 2503.14476), 'constant' the sum over tokens
      / (answers x max_new_tokens) (Dr.GRPO, arXiv 2503.20783).
    lengths: [n] tokens of the answers that count; 0 for one that is left out.
    max_new_tokens: the longest that an answer could be.
  """
  real = lengths > 0
  answers = max(int(real.sum()), 1)
  if aggregation == 'sequence_mean':
    return np.where(real, 1.0 / (answers * np.maximum(lengths, 1)), 0.0)
  total = lengths.sum() if aggregation == 'token_mean' else answers * max_new_tokens
  return np.where(real, 1.0 / max(int(total), 1), 0.0)


def sums(
  cfg: schema.PolicyConfig,
  log_probs: Array,
  targets: Array,
  segment_ids: Array,
  batch: Mapping[str, Array],
  values: Array | None = None,
) -> tuple[Array, Figures]:
  """(this share of the loss, its figures); the first alone is to be differentiated.

  Args:
    cfg: `objective.policy`.
    log_probs: [B, L] float32, of the targets under the policy.
    targets: [B, L] int32; -1 where no answer is learned.
    segment_ids: [B, L] int32, one per answer with its question; 0 for padding.
    batch: `ADVANTAGES`, `WEIGHTS`, `OLD` and, with a reference, `REFERENCE`; with a value head
      `RETURNS` and `VALUES`.
    values: [B, L] float32, of the value head at every place; PPO only.
  """
  learned = targets >= 0
  advantages, weights = batch[ADVANTAGES], batch[WEIGHTS]
  log_ratio = jnp.where(learned, log_probs - batch[OLD], 0.0)
  if cfg.algorithm == 'rft':
    ratio, losses = jnp.exp(log_ratio), -advantages * log_probs
    clipped = jnp.zeros_like(learned)
  else:
    ratio = jnp.exp(_of_answer(cfg.ratio, log_ratio, log_probs, learned, segment_ids))
    losses, clipped = _clipped(cfg, ratio, advantages)
  kl = jnp.zeros_like(log_probs)
  if cfg.kl_weight:
    # Where nothing is learned both are 0.
    d = jnp.clip(batch[REFERENCE] - log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = jnp.exp(d) - d - 1
    if cfg.algorithm != 'ppo':
      losses += cfg.kl_weight * (kl if cfg.kl == 'k3' else 0.5 * d * d)

  def total(values: Array) -> Array:
    return jax.lax.stop_gradient(jnp.where(learned, values, 0.0).sum())

  figures = Figures(
    tokens=learned.sum().astype(jnp.float32),
    clipped=total(clipped.astype(jnp.float32)),
    kl=total(kl),
    ratio=total(ratio),
  )
  if values is not None:
    squares, held = _value_losses(cfg.ppo.value_clip, values, batch)
    losses += cfg.ppo.value_weight * squares
    figures = figures._replace(
      value_loss=total(squares), value_clipped=total(held.astype(jnp.float32))
    )
  return jnp.where(learned, weights * losses, 0.0).sum(), figures


def _value_losses(clip: float, values: Array, batch: Mapping[str, Array]) -> tuple[Array, Array]:
  """(half squared errors, whether the clipped value has the larger one), both [B, L]."""
  squares = 0.5 * jnp.square(values - batch[RETURNS])
  if not clip:
    return squares, jnp.zeros(squares.shape, bool)
  near = batch[VALUES] + jnp.clip(values - batch[VALUES], -clip, clip)
  others = 0.5 * jnp.square(near - batch[RETURNS])
  return jnp.maximum(squares, others), others > squares


def _of_answer(
  kind: str, log_ratio: Array, log_probs: Array, learned: Array, segment_ids: Array
) -> Array:
  """[B, L] log-ratios of the tokens, or of the answers that they belong to."""
  if kind == 'token':
    return log_ratio
  num = segment_ids.shape[1] + 1

  def row(values, learned, ids):
    total = jax.ops.segment_sum(values, ids, num)
    count = jax.ops.segment_sum(learned.astype(values.dtype), ids, num)
    return (total / jnp.maximum(count, 1.0))[ids]

  mean = jax.vmap(row)(log_ratio, learned, segment_ids)
  if kind == 'sequence':
    return mean
  # The value of the answer's ratio, the gradient of the token.
  return jax.lax.stop_gradient(mean) + log_probs - jax.lax.stop_gradient(log_probs)


def _clipped(cfg: schema.PolicyConfig, ratio: Array, advantages: Array) -> tuple[Array, Array]:
  """(losses, whether the clipping takes the gradient away), both [B, L]."""
  held = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
  gains = jnp.minimum(ratio * advantages, held * advantages)
  clipped = held * advantages < ratio * advantages
  if cfg.dual_clip:
    floor = cfg.dual_clip * advantages
    clipped |= (advantages < 0) & (gains < floor)
    gains = jnp.where(advantages < 0, jnp.maximum(gains, floor), gains)
  return -gains, clipped
