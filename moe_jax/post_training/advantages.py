"""Advantages of answers, by their group (DeepSeekMath, arXiv 2402.03300, section 4.1) or by values.

Axis letters: g answers of a group, n tokens of an answer.
"""

from collections.abc import Sequence

import numpy as np

# What a deviation is never below. The paper names none; a group of equal rewards gets exactly 0.
EPSILON = 1e-6


def normalised(values: np.ndarray, std: str) -> np.ndarray:
  """Values less their mean, divided by their deviation; 0 where all are equal.

  Args:
    values: [n] rewards of one group.
    std: 'sample' (n - 1 in the denominator, as the field has it; the paper does not say) or
      'population' deviation, or 'none' to divide by nothing (Dr.GRPO, arXiv 2503.20783).
  """
  values = np.asarray(values, np.float64)
  if len(values) < 2 or np.all(values == values[0]):
    return np.zeros_like(values)
  centred = values - values.mean()
  if std == 'none':
    return centred
  return centred / (values.std(ddof=1 if std == 'sample' else 0) + EPSILON)


def outcome(rewards: np.ndarray, std: str) -> np.ndarray:
  """Advantage of every answer, the same for all of its tokens: rewards [g] -> [g].

  An answer whose reward is NaN takes no part, and gets 0.
  """
  rewards = np.asarray(rewards, np.float64)
  known = np.isfinite(rewards)
  found = np.zeros_like(rewards)
  found[known] = normalised(rewards[known], std)
  return found


def process(
  steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], std: str
) -> list[np.ndarray]:
  """Advantage of every token of every answer, one [n] per answer.

  Rewards are normalised over all steps of the whole group; a token's advantage is the sum of those
  of the steps that end at it or behind it.

  Args:
    steps: of each answer (index of a step's last token, reward).
    lengths: tokens of each answer.
    std: see `normalised`.
  """
  flat = normalised(np.array([value for one in steps for _, value in one]), std)
  found, at = [], 0
  for one, length in zip(steps, lengths, strict=True):
    at_end = np.zeros(length)
    for index, _ in one:
      at_end[index] += flat[at]
      at += 1
    found.append(np.cumsum(at_end[::-1])[::-1])
  return found


def generalised(
  rewards: np.ndarray, values: np.ndarray, behind: float, gamma: float, gae_lambda: float
) -> np.ndarray:
  """Generalised advantage estimates of the tokens of an answer: [n] (arXiv 1506.02438, eq. 16).

  With errors d_t = r_t + gamma v_(t+1) - v_t an advantage is the sum of (gamma lambda)^k d_(t+k).

  Args:
    rewards: [n] for each token.
    values: [n] of the states in which the tokens are drawn.
    behind: value of the state behind the last token; 0 where the answer is over.
    gamma: what a reward is worth one token earlier.
    gae_lambda: 1 gives returns less values, 0 the errors themselves.
  """
  rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
  errors = rewards + gamma * np.append(values[1:], behind) - values
  found, after = np.zeros_like(errors), 0.0
  for t in reversed(range(len(errors))):
    found[t] = after = errors[t] + gamma * gae_lambda * after
  return found


def whitened(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Values less their weighted mean, divided by their weighted deviation; 0 where all are equal.

  Args:
    values: [n].
    weights: [n], not negative; where one is 0 the value plays no part, and gets 0.
  """
  values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
  real = weights > 0
  if not real.any() or np.all(values[real] == values[real][0]):
    return np.zeros_like(values)
  share = weights / weights.sum()
  centred = np.where(real, values, 0.0) - (share[real] * values[real]).sum()
  deviation = np.sqrt((share[real] * centred[real] ** 2).sum())
  return np.where(real, centred / (deviation + EPSILON), 0.0)
