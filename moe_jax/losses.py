"""Next-token cross-entropy and z-loss: pure functions of arrays."""

import jax
import jax.numpy as jnp

Array = jax.Array


def next_token(logits: Array, targets: Array) -> tuple[Array, Array]:
  """Sums over the real targets, so that micro-batches and devices add up.

  Args:
    logits: [B, L, V] float32.
    targets: [B, L] int32; -1 where there is nothing to predict.

  Returns:
    (cross-entropy in nats, squared log-partition (z-loss, PaLM section 5)), both [] float32.
  """
  real = targets >= 0
  log_z = jax.nn.logsumexp(logits, axis=-1)
  label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  cross_entropy = jnp.where(real, log_z - label, 0.0).sum()
  return cross_entropy, jnp.where(real, log_z * log_z, 0.0).sum()
