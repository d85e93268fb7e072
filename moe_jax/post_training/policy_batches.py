"""Batches of answers with their advantages, for the loss of a policy; rows made on the host.

Axis letters: n tokens of an answer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import schema
from moe_jax.data import packing, whole_documents
from moe_jax.post_training import advantages, rollouts, token_ends, value_targets
from moe_jax.rewards import reward
from moe_jax.training import policy_loss

Decode = Callable[[Sequence[int]], str]


class Judged(NamedTuple):
  """An answer, what it is worth, and what its tokens are worth beside the others of its group."""

  answer: rollouts.Answer
  reward: reward.Reward
  advantages: np.ndarray  # [n] float64; of PPO 0, as they need values: see `value_targets`
  rewards: np.ndarray | None = None  # [n] float64, of each token; PPO only


def step_ends(
  decode: Decode, ids: Sequence[int], offsets: Sequence[int], skipped: int, ended: bool
) -> list[int]:
  """Index of the token with which each step ends: its text reaches the offset; or the last one.

  The last step of an answer with an end token ends with that, if only space is between: to stop is
  part of it, as it is of the answer. What is behind the text is at the last token.

  Args:
    decode: ids to text.
    ids: of an answer.
    offsets: rising, characters behind the last one of each step, counted behind `skipped`.
    skipped: characters of the text that come before the one that offsets count from.
    ended: whether the last id is an end token.
  """
  written = ids[:-1] if ended else ids
  text, last, found = decode(written), len(ids) - 1, []
  for number, offset in enumerate(offsets, start=1):
    at = offset + skipped
    stops = ended and number == len(offsets) and not text[at:].strip()
    if stops or at > len(text):
      found.append(last)
    else:
      size = token_ends.reaching(lambda n: decode(written[:n]), len(written), text[:at])
      found.append(size - 1)
  return found


def judged(
  policy: schema.PolicyConfig,
  answers: Sequence[rollouts.Answer],
  found: Sequence[reward.Reward],
  ends: Callable[[int], list[int]],
) -> list[list[Judged]]:
  """The groups of answers, each with its advantages.

  Args:
    policy: how rewards become advantages.
    answers: groups of `group_size`, one after the other.
    found: their rewards.
    ends: number of an answer -> index of the last token of each of its steps, see `step_ends`.
  """
  if policy.algorithm == 'ppo':
    rewards = value_targets.rewards(policy, answers, found, ends)
    flat = [Judged(a, f, np.zeros(len(r)), r) for a, f, r in zip(answers, found, rewards)]
    return [flat[i : i + policy.group_size] for i in range(0, len(flat), policy.group_size)]
  size, groups = policy.group_size, []
  for begin in range(0, len(answers), size):
    here = range(begin, begin + size)
    lengths = [len(answers[i].tokens) for i in here]
    if policy.supervision == 'process':
      steps = [
        [(at, value) for at, (_, value) in zip(ends(i), found[i].step_rewards or ())]
        if value_targets.counts(policy, answers[i])
        else []
        for i in here
      ]
      per_token = advantages.process(steps, lengths, policy.std)
    else:
      if policy.algorithm == 'rft':
        values = np.array([float(found[i].kind == 'right') for i in here])
      else:
        known = [
          found[i].value if value_targets.counts(policy, answers[i]) else np.nan for i in here
        ]
        values = advantages.outcome(np.array(known), policy.std)
      per_token = [np.full(n, value) for n, value in zip(lengths, values)]
    groups.append([Judged(answers[i], found[i], a) for i, a in zip(here, per_token)])
  return groups


def is_mixed(group: Sequence[Judged]) -> bool:
  """Whether any answer of a group is worth more than another."""
  if group[0].rewards is not None:
    return len({float(one.rewards.sum()) for one in group if one.rewards is not None}) > 1
  return any(np.any(one.advantages) for one in group)


def rows(
  cfg: schema.Config, answers: Sequence[Judged], num_layers: int
) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
  """Rows of whole answers with their questions, and where each answer lies.

  Args:
    cfg: the run; the number of rows is a multiple of `train.batch_size`, see `filled`.
    answers: those that are learned from.
    num_layers: MoE layers whose experts, K per token, are to be replayed; 0 for none.

  Returns:
    (arrays [B, L] of `packing` and `policy_loss`, old log-probabilities 0 and experts those of the
    sampler; (row, place of its first token) of every answer). The last token of an answer whose
    value goes on (`value_targets.goes_on`) is read too.
  """
  policy, length = cfg.objective.policy, cfg.model.max_seq_len
  lengths = np.array(
    [len(a.answer.tokens) * value_targets.counts(policy, a.answer) for a in answers], np.int64
  )
  weights = policy_loss.weights_of(policy.aggregation, lengths, policy.max_new_tokens)
  places = np.array(
    [
      len(one.answer.prompt)
      + len(one.answer.tokens)
      - (not value_targets.goes_on(policy, one.answer))
      for one in answers
    ]
  )
  order = np.argsort(-places, kind='stable')
  bins = [order[members] for members in whole_documents.best_fit(places[order], length)]
  num_rows = filled(len(bins), cfg.train.batch_size)
  batch: dict[str, np.ndarray] = packing.stack([packing.padding_row(length)] * num_rows)
  for key in (policy_loss.ADVANTAGES, policy_loss.WEIGHTS, policy_loss.OLD):
    batch[key] = np.zeros((num_rows, length), np.float32)
  if num_layers:
    per_token = cfg.model.moe.num_experts_per_tok
    shape = (num_rows, length, num_layers, per_token)
    batch[policy_loss.EXPERTS] = np.zeros(shape, np.int32)
  where = [(0, 0)] * len(answers)
  for row, members in enumerate(bins):
    at = 0
    for segment, number in enumerate(members, start=1):
      one = answers[number]
      where[number] = row, at
      size = int(places[number])
      _place(batch, row, at, size, segment, one, float(weights[number]))
      at += size
  return batch, where


def filled(num_rows: int, batch_size: int) -> int:
  """Rows rounded up to whole batches, whose number is one of eight between two powers of two.

  Answers of other lengths fill another number of rows in every iteration, and a step is compiled
  anew for each number: so there are few of them, for at most an eighth of empty rows.
  """
  batches = -(-num_rows // batch_size)
  unit = 1 << max(batches.bit_length() - 4, 0)
  return -(-batches // unit) * unit * batch_size


def _place(
  batch: dict[str, np.ndarray],
  row: int,
  at: int,
  size: int,
  segment: int,
  one: Judged,
  weight: float,
):
  """Writes an answer with its question into a row; it is learned unless its weight is 0."""
  answer = one.answer
  ids = np.array([*answer.prompt, *answer.tokens], np.int32)
  whole = row, slice(at, at + size)
  written = row, rollouts.places_of(answer, at)
  batch['tokens'][whole] = ids[:size]
  batch['segment_ids'][whole] = segment
  batch['positions'][whole] = np.arange(size)
  if weight:
    batch['targets'][written] = answer.tokens
  batch[policy_loss.ADVANTAGES][written] = one.advantages
  batch[policy_loss.WEIGHTS][written] = weight
  if policy_loss.EXPERTS in batch:
    assert answer.experts is not None
    batch[policy_loss.EXPERTS][row, at : at + len(ids) - 1] = answer.experts.swapaxes(0, 1)


def sampler_figures(
  policy: schema.PolicyConfig,
  answers: Sequence[Judged],
  where: Sequence[tuple[int, int]],
  trainer: np.ndarray,
  own: np.ndarray | None,
) -> dict[str, float | None]:
  """How far the trainer is from the sampler on the same weights and tokens.

  Log-probabilities are compared where the trainer has them: of the answers that count. Without one
  their figures are None.

  Args:
    policy: which answers count.
    answers: as given to `rows`.
    where: as `rows` has returned it.
    trainer: [B, L] log-probabilities of the targets under the weights that have sampled.
    own: [B, L, MoE layers, K] experts that the trainer chooses itself; None for a dense model.
  """
  gaps, differ, total = [], 0, 0
  for one, (row, at) in zip(answers, where):
    here = rollouts.places_of(one.answer, at)
    if value_targets.counts(policy, one.answer):
      gaps.append(trainer[row, here] - one.answer.log_probs)
    if own is not None:
      assert one.answer.experts is not None
      mine = np.sort(own[row, at : here.stop], axis=-1)
      theirs = np.sort(one.answer.experts.swapaxes(0, 1), axis=-1)
      differ += int((mine != theirs).any(axis=(1, 2)).sum())
      total += len(mine)
  figures: dict[str, float | None] = {
    'sampler_log_ratio': None,
    'sampler_log_ratio_max': None,
    'sampler_k3': None,
    'experts_differ': None if own is None else differ / max(total, 1),
  }
  if gaps:
    gap = np.concatenate(gaps).astype(np.float64)
    figures['sampler_log_ratio'] = float(np.abs(gap).mean())
    figures['sampler_log_ratio_max'] = float(np.abs(gap).max())
    figures['sampler_k3'] = float((np.exp(gap) - gap - 1).mean())
  return figures


def answer_figures(groups: Sequence[Sequence[Judged]]) -> dict[str, Any]:
  """Means over the answers of an iteration: reward, rightness, length, ends, entropy."""
  flat = [one for group in groups for one in group]
  return {
    'reward': float(np.mean([one.reward.value for one in flat])),
    'right_share': float(np.mean([one.reward.kind == 'right' for one in flat])),
    'answer_tokens': float(np.mean([len(one.answer.tokens) for one in flat])),
    'ended_share': float(np.mean([one.answer.ended for one in flat])),
    'entropy': float(np.concatenate([one.answer.entropy for one in flat]).mean()),
    'equal_groups': (
      None if len(groups[0]) == 1 else float(np.mean([not is_mixed(group) for group in groups]))
    ),
  }
