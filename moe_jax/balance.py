"""Balance bookkeeping: pure functions of routing arrays. Padding is never counted.

Axis letters: B batch, L length, E experts, K experts per token. A token with expert index E (one
past the last) is not routed and not counted.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def expert_load(expert_idx: Array, num_experts: int) -> Array:
  """Tokens per expert and sequence: expert_idx [..., L, K] int32 -> [..., E] int32.

  The sum over experts is the number of routed tokens times K.
  """
  flat = expert_idx.reshape(*expert_idx.shape[:-2], -1)
  return jnp.sum(flat[..., None] == jnp.arange(num_experts), axis=-2, dtype=jnp.int32)


def expert_level_loss(scores: Array, load: Array, num_tokens: Array, experts_per_tok: int) -> Array:
  """Expert-level balance loss of each sequence, before its weight (DeepSeekMoE, Eq. 12-14).

  sum_i f_i P_i with f_i = E / (K T) * load_i, which carries no gradient, and P_i the mean score of
  expert i, over the T real tokens of the sequence. Its value at perfect balance is 1; when every
  token picks the same K experts with all the score on them it is E / K.

  Args:
    scores: [B, L, E] float32, 0 for padding.
    load: [B, E] int32, see `expert_load`.
    num_tokens: [B] int32, real tokens T per sequence; a sequence without any gives 0.
    experts_per_tok: K.

  Returns:
    [B] float32.
  """
  tokens = jnp.maximum(num_tokens, 1)[:, None].astype(jnp.float32)
  frequency = load * (load.shape[-1] / experts_per_tok) / tokens
  mean_score = scores.sum(axis=1) / tokens
  return jnp.sum(jax.lax.stop_gradient(frequency) * mean_score, axis=-1)


def max_vio(load: Array | np.ndarray) -> Array | np.ndarray:
  """MaxVio = (max load - mean load) / mean load over the experts (arXiv 2408.15664, section 4.1).

  Args:
    load: [..., E] token counts.

  Returns:
    [...]; 0 is perfect balance, E - 1 is every token on one expert (K = 1). 0 where nothing was
    routed.
  """
  xp = np if isinstance(load, np.ndarray) else jnp
  mean = xp.maximum(load.mean(axis=-1), 1e-9)
  return load.max(axis=-1) / mean - (load.sum(axis=-1) > 0)
