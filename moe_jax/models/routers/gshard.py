"""GShard's random dispatch of the second expert (arXiv 2006.16668, section 2.2, Algorithm 1)."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import integer_hash
from moe_jax.config import moe_config
from moe_jax.models.routers import routing

Array = jax.Array


def keeps_second(
  cfg: moe_config.MoEConfig, decision: routing.Routing, tokens: routing.Tokens, layer: Array
) -> Array:
  """Which choices are dispatched: [B, L, 2] bool, the second with probability min(1, 2 g2).

  g2 is the gate before `routed_scaling_factor`, which weighs outputs and is no probability. The
  paper draws after counting the token against the expert's capacity; here, as in the field's
  implementations, a token that is not sent takes no room. Every remat policy saves the result: a
  gate recomputed under different rounding could send a gradient to an expert that never ran.
  """
  noise = integer_hash.uniform(routing.token_noise(tokens, layer, salt=2))
  gate = jax.lax.stop_gradient(decision.gates[..., 1]) / cfg.routed_scaling_factor
  second = 2 * gate > noise
  return checkpoint_name(jnp.stack([jnp.ones_like(second), second], axis=-1), 'routing')
