"""How much of the future Expert Choice can leak to the past (arXiv 2408.15664, section 5).

Expert Choice lets every expert pick its tokens from a whole chunk, so that which experts a token
gets depends on later tokens. `bits_per_token` says how much such an allocation can carry,
`changed_assignments` how much of it really changes with the future.

E experts, K experts per token on average, r = K / E, T tokens that compete for them.
"""

import math

import numpy as np


def bits_per_token(num_experts: int, experts_per_tok: int, tokens: int) -> float:
  """I = (E / T) log2 binomial(T, K T / E), bits per token and layer, were all sets as likely.

  K T / E is rounded down to whole tokens. Where it is whole and positive, I exceeds `lower_bound`
  for every T, as binomial(T, m) >= (T / m)^m > ((T - m) / m)^m; with rounding it may not (it is 0
  for T < E / K). For large T it rises to E times the binary entropy of r, K log2(1 / r) +
  (E - K) log2(1 / (1 - r)), which stays above the bound: the bound is not tight.
  """
  return bits_of(num_experts, experts_per_tok * tokens // num_experts, tokens)


def bits_of(num_experts: int, taken: int, tokens: int) -> float:
  """(N / T) log2 C(T, m): the same for experts that take m = `taken` tokens each."""
  ln_choices = math.lgamma(tokens + 1) - math.lgamma(taken + 1) - math.lgamma(tokens - taken + 1)
  return num_experts / tokens * ln_choices / math.log(2)


def lower_bound(num_experts: int, experts_per_tok: int) -> float:
  """K log2((1 - r) / r), the paper's closed form for any T.

  It says nothing (is not positive) from r = 1 / 2 on, and is -inf for K = E.
  """
  if experts_per_tok == num_experts:
    return -math.inf
  return experts_per_tok * math.log2((num_experts - experts_per_tok) / experts_per_tok)


def changed_assignments(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> float:
  """The share of (layer, past token) pairs whose set of experts differs.

  Two forward passes over rows that agree up to some place and differ after it: 0 for a causal
  router, whatever comes later.

  Args:
    before: [layers, B, L, K] integers, experts in any order; E, one past the last, is no expert.
    after: the same of the other pass.
    mask: [B, L] bool, the real tokens that both passes share.
  """
  if before.shape != after.shape or before.shape[1:3] != mask.shape:
    raise ValueError(f'shapes {before.shape}, {after.shape} and mask {mask.shape} do not match')
  if not mask.any():
    raise ValueError('mask has no token to compare')
  differs = (np.sort(before, axis=-1) != np.sort(after, axis=-1)).any(axis=-1)
  return float(differs[:, mask].mean())
