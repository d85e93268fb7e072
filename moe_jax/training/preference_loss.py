"""Loss of preferences over a reference model: DPO (arXiv 2305.18290), IPO, and their variants.

A row holds pairs of answers to one prompt, each answer with its prompt as a segment of its own, the
chosen one 2 k + 1 and the rejected one 2 k + 2. With policy p, reference q and the log-probability
of an answer the sum over its tokens (or their mean, `length_normalised`), the margin is

  h = (log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))

and the loss -log sigmoid(beta h) (eps of label smoothing: the two signs mixed, cDPO) or
(h - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, whose tau is beta).

A row could hold half as many `pairs` as places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import schema

Array = jax.Array


class Answers(NamedTuple):
  """Of the two answers of every pair, (chosen, rejected) last."""

  log_probs: Array  # [B, pairs, 2] float32, sums in nats
  num_tokens: Array  # [B, pairs, 2] float32, tokens that are learned; 0 where there is no pair


class Figures(NamedTuple):
  """Sums over pairs, each [] float32; those of micro-batches add up."""

  pairs: Array
  loss: Array
  correct: Array  # pairs with h > 0
  chosen_reward: Array  # beta (log p - log q) of the chosen answers
  rejected_reward: Array
  chosen_tokens: Array
  rejected_tokens: Array
  log_ratio: Array  # log p - log q of both, not normalised; over tokens, see `means`

  def means(self) -> dict[str, float]:
    """Means over pairs by name; of sums fetched from the devices.

    `reference_kl` is the mean over the tokens of both answers of log p - log q: the estimate of
    KL(p || q) that the data allow, exact only if p had written them; it turns negative when both
    answers become less likely.
    """
    pairs = max(float(self.pairs), 1.0)
    tokens = max(float(self.chosen_tokens) + float(self.rejected_tokens), 1.0)
    chosen, rejected = float(self.chosen_reward) / pairs, float(self.rejected_reward) / pairs
    return {
      'preference_loss': float(self.loss) / pairs,
      'preference_accuracy': float(self.correct) / pairs,
      'reward_margin': chosen - rejected,
      'chosen_reward': chosen,
      'rejected_reward': rejected,
      'chosen_tokens': float(self.chosen_tokens) / pairs,
      'rejected_tokens': float(self.rejected_tokens) / pairs,
      'reference_kl': float(self.log_ratio) / tokens,
    }


FIGURES = tuple(Figures(*[0.0] * 8).means())  # type: ignore[list-item]


def per_answer(values: Array, segment_ids: Array) -> Array:
  """[B, L] -> [B, pairs, 2], sums over the segments of each pair."""
  num_pairs = segment_ids.shape[1] // 2

  def row(values, segment_ids):
    sums = jax.ops.segment_sum(values, segment_ids, 2 * num_pairs + 1)
    return sums[1:].reshape(num_pairs, 2)  # 0 is padding

  return jax.vmap(row)(values, segment_ids)


def answers(log_probs: Array, targets: Array, segment_ids: Array) -> Answers:
  """Sums over answers of the log-probabilities of their tokens.

  Args:
    log_probs: [B, L] float32, see `cross_entropy.token_log_probs`.
    targets: [B, L] int32; -1 where nothing is learned.
    segment_ids: [B, L] int32, two per pair, 0 for padding.
  """
  learned = (targets >= 0).astype(jnp.float32)
  return Answers(per_answer(log_probs, segment_ids), per_answer(learned, segment_ids))


def sums(cfg: schema.DpoConfig, policy: Answers, reference: Array) -> Figures:
  """Loss and figures, summed over pairs; `loss` alone is to be differentiated.

  Args:
    cfg: `objective.dpo`.
    policy: of the model that is trained.
    reference: [B, pairs, 2] float32, log-probabilities of the answers under the reference, sums.
  """
  real = policy.num_tokens[..., 0] > 0
  ratio = policy.log_probs - reference
  scaled = ratio / jnp.maximum(policy.num_tokens, 1.0) if cfg.length_normalised else ratio
  margin = scaled[..., 0] - scaled[..., 1]
  if cfg.loss == 'ipo':
    loss = (margin - 1 / (2 * cfg.beta)) ** 2
  else:
    right, wrong = (jax.nn.log_sigmoid(sign * cfg.beta * margin) for sign in (1.0, -1.0))
    loss = -(1 - cfg.label_smoothing) * right - cfg.label_smoothing * wrong

  def total(values: Array) -> Array:
    return jnp.where(real, values, 0.0).sum()

  return Figures(
    pairs=real.sum().astype(jnp.float32),
    loss=total(loss),
    correct=total((margin > 0).astype(jnp.float32)),
    chosen_reward=total(cfg.beta * scaled[..., 0]),
    rejected_reward=total(cfg.beta * scaled[..., 1]),
    chosen_tokens=total(policy.num_tokens[..., 0]),
    rejected_tokens=total(policy.num_tokens[..., 1]),
    log_ratio=total(ratio.sum(-1)),
  )
