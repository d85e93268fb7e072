"""What PPO learns from: rewards of tokens, their advantages, and returns for the value head.

A reward stands at one token: that of the answer at its last one (arXiv 2402.03300, equation 2), or
that of a step at the last one of the step (Math-Shepherd, arXiv 2312.08935, which names no other
reward for the answer). From each token's reward the distance to the reference is taken,
beta (log p_old - log q). Everything is made on the host in float64 over the answers of a whole
iteration: micro-batches, devices and padding have no part in it.

Axis letters: n tokens of an answer.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.config import schema
from moe_jax.post_training import advantages, rollouts
from moe_jax.rewards import reward
from moe_jax.training import policy_loss


def counts(policy: schema.PolicyConfig, answer: rollouts.Answer) -> bool:
  """Whether an answer takes part: a cut one does not if the config leaves these out."""
  return answer.ended or policy.truncated != 'leave_out'


def goes_on(policy: schema.PolicyConfig, answer: rollouts.Answer) -> bool:
  """Whether the value of an answer's last state stands for the outcome that did not come."""
  return not answer.ended and policy.truncated == 'bootstrap'


def of_what_came(
  policy: schema.PolicyConfig, answer: rollouts.Answer, text: str, found: reward.Reward
) -> reward.Reward:
  """A reward without the steps that an answer that goes on has not completed.

  These are the line that is cut off, and behind the text the answer that is missing: both may still
  come, and the value of the last state stands for them. Of other answers the reward as it is.

  Args:
    policy: whether answers go on.
    answer: that the reward is of.
    text: what it says.
    found: its reward, whose steps are lines.
  """
  if found.step_rewards is None or not goes_on(policy, answer):
    return found
  # A line is complete once another one has begun, if with nothing yet.
  came = [one for one in found.step_rewards if len(f'{text[one[0] :]}.'.splitlines()) > 1]
  return found._replace(step_rewards=came)


def rewards(
  policy: schema.PolicyConfig,
  answers: Sequence[rollouts.Answer],
  found: Sequence[reward.Reward],
  ends: Callable[[int], list[int]],
) -> list[np.ndarray]:
  """The reward of every token, [n] float64 per answer, without the distance to the reference.

  Args:
    policy: how the run is supervised.
    answers: of an iteration; those that do not count get 0.
    found: what they are worth, see `of_what_came`.
    ends: number of an answer -> index of the last token of each of its steps.
  """
  made = [np.zeros(len(one.tokens)) for one in answers]
  here = [i for i, one in enumerate(answers) if counts(policy, one)]
  if policy.supervision == 'outcome':
    for i in here:
      if not goes_on(policy, answers[i]):
        made[i][-1] = found[i].value
    return made
  steps = [(i, at, r) for i in here for at, (_, r) in zip(ends(i), found[i].step_rewards or ())]
  baseline = 0.0
  if policy.ppo.center_steps and steps:
    baseline = float(np.mean([value for _, _, value in steps]))
  for i, at, value in steps:
    made[i][at] += value - baseline
  return made


def fill(
  policy: schema.PolicyConfig,
  batch: dict[str, np.ndarray],
  answers: Sequence[rollouts.Answer],
  token_rewards: Sequence[np.ndarray],
  where: Sequence[tuple[int, int]],
  values: np.ndarray,
) -> dict[str, float]:
  """Writes advantages, returns and the sampler's values into a batch; returns figures.

  Advantages are whitened over the tokens of all answers that count, each token alike; returns are
  the advantages before that plus the values.

  Args:
    policy: gamma, gae_lambda and the weight of the distance.
    batch: of `policy_batches.rows`, with old log-probabilities and, with a reference, its own.
    answers: as given to `rows`.
    token_rewards: [n] per answer, see `rewards`.
    where: (row, place of its first token) of every answer.
    values: [B, L] of the value head under the weights that have sampled.

  Returns:
    `policy_loss.PPO_ROLLOUT_FIGURES`: the share of the returns' variance that the values explain
    (1 - Var(return - value) / Var(return); 0 where the returns do not vary), the mean of the
    advantages before whitening, and that of the returns.
  """
  values = values.astype(np.float64)
  raw, known, real = [], [], []
  for one, own, (row, at) in zip(answers, token_rewards, where, strict=True):
    here = row, rollouts.places_of(one, at)
    penalised = own
    if policy.kl_weight:
      old, reference = (batch[key][here] for key in (policy_loss.OLD, policy_loss.REFERENCE))
      penalised = own - policy.kl_weight * (old.astype(np.float64) - reference)
    behind = values[row, here[1].stop] if goes_on(policy, one) else 0.0
    raw.append(
      advantages.generalised(
        penalised, values[here], behind, policy.ppo.gamma, policy.ppo.gae_lambda
      )
    )
    known.append(values[here])
    real.append(np.full(len(own), float(counts(policy, one))))
  flat, old_values, weights = (np.concatenate(part) for part in (raw, known, real))
  new, begin = advantages.whitened(flat, weights), 0
  for key in (policy_loss.RETURNS, policy_loss.VALUES):
    batch[key] = np.zeros(values.shape, np.float32)
  for one, (row, at) in zip(answers, where):
    here, part = (row, rollouts.places_of(one, at)), slice(begin, begin + len(one.tokens))
    batch[policy_loss.ADVANTAGES][here] = new[part]
    batch[policy_loss.RETURNS][here] = flat[part] + old_values[part]
    batch[policy_loss.VALUES][here] = old_values[part]
    begin = part.stop
  return _figures(flat, old_values, weights > 0)


def _figures(flat: np.ndarray, values: np.ndarray, real: np.ndarray) -> dict[str, float]:
  if not real.any():
    return dict.fromkeys(policy_loss.PPO_ROLLOUT_FIGURES, 0.0)
  returns = (flat + values)[real]
  spread = returns.var()
  return {
    'explained_variance': 1 - float(flat[real].var() / spread) if spread else 0.0,
    'advantage_mean': float(flat[real].mean()),
    'return_mean': float(returns.mean()),
  }
