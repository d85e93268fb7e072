"""How far one label of a token decides its experts: mutual information, corrected for chance.

Let e be one of a token's K experts, drawn evenly, and c a label (token id, place, domain). If the
label decides the whole set, H(e | c) = ln K and I(e; c) = H(e) - ln K; so the share

  (I - I_0) / (H(e) - ln K - I_0)

is 1 then and 0 where the label says nothing. I_0 is what shuffled labels give: with few tokens per
label the plug-in estimate of I is far above 0 by itself.

Axis letters are those of `moe_jax.models`.
"""

import numpy as np


def counts(expert_idx: np.ndarray, labels: np.ndarray, num_experts: int) -> np.ndarray:
  """[labels, E] int64, how often each expert was chosen by tokens with each label.

  Args:
    expert_idx: [T, K] in 0..E; E = no expert.
    labels: [T], numbered from 0.
    num_experts: E.
  """
  num_labels = int(labels.max(initial=-1)) + 1
  pair = labels[:, None].astype(np.int64) * (num_experts + 1) + expert_idx
  table = np.bincount(pair.ravel(), minlength=num_labels * (num_experts + 1))
  return table.reshape(num_labels, num_experts + 1)[:, :num_experts]


def entropy(weights: np.ndarray) -> float:
  """Of a distribution in proportion to `weights`, nats."""
  p = weights[weights > 0] / weights.sum()
  return float(-(p * np.log(p)).sum())


def mutual_information(table: np.ndarray) -> float:
  """Between rows and columns of a table of counts, nats; the plug-in estimate."""
  return entropy(table.sum(axis=0)) + entropy(table.sum(axis=1)) - entropy(table.ravel())


def decided_share(
  expert_idx: np.ndarray, labels: np.ndarray, num_experts: int, seed: int = 0
) -> float:
  """Share of the choice of experts that the label decides; see the module. NaN if there is none.

  Args:
    expert_idx: [T, K] in 0..E; tokens without a choice should be left out.
    labels: [T] int, any values of at least 0.
    num_experts: E.
    seed: of the shuffling.
  """
  _, labels = np.unique(labels, return_inverse=True)
  table = counts(expert_idx, labels, num_experts)
  shuffled = np.random.default_rng(seed).permutation(labels)
  chance = mutual_information(counts(expert_idx, shuffled, num_experts))
  per_token = (expert_idx < num_experts).sum(axis=1).mean()
  most = entropy(table.sum(axis=0)) - np.log(per_token)
  if most - chance < 1e-9:
    return float('nan')
  return float((mutual_information(table) - chance) / (most - chance))
