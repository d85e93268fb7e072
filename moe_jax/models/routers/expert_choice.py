"""Expert Choice: every expert takes its best tokens (Zhou et al., arXiv 2202.09368).

Balanced by construction, and not causal: whether an expert takes a token depends on later tokens of
the chunk, which leaks the future (arXiv 2408.15664, section 5.2). `shuffle_chunks` deals the tokens
of the batch to chunks at random, which closes most of that channel.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import errors
from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing

Array = jax.Array


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Returns E columns per token, best first, of which those not taken are E; K on average.

  In a chunk with n real tokens every expert takes floor(K n / E), at least 1.
  """
  del train
  scores, mask = inputs.scores, inputs.tokens.mask
  b, length, e = scores.shape
  chunk = cfg.options.chunk_tokens or length
  if b * length % chunk:
    raise errors.InputError(
      f'config.model.moe.options.chunk_tokens={chunk} must divide the tokens of a forward pass, '
      f'{b} rows x {length}; choose a divisor, or 0 for one row'
    )
  flat = jnp.where(mask[..., None], jax.lax.stop_gradient(scores), -jnp.inf).reshape(b * length, e)
  taken = _take(flat, inputs, cfg, chunk).reshape(scores.shape)
  order = jnp.argsort(jnp.where(taken, -scores, jnp.inf), axis=-1)
  used = jnp.take_along_axis(taken, order, axis=-1)
  expert_idx = checkpoint_name(jnp.where(used, order, e).astype(jnp.int32), 'routing')
  return routing.Routing(routing.gates_of(scores, expert_idx, cfg), expert_idx, scores)


def _take(flat: Array, inputs: routing.Inputs, cfg: moe_config.MoEConfig, chunk: int) -> Array:
  """[T, E] scores, -inf for padding -> [T, E] bool, which expert takes which token."""
  if cfg.options.shuffle_chunks:
    noise = routing.token_noise(inputs.tokens, inputs.layer, salt=3)
    deal = jnp.argsort(noise.reshape(-1))
    back = jnp.argsort(deal)
    return _take_chunks(flat[deal], cfg, chunk)[back]
  return _take_chunks(flat, cfg, chunk)


def _take_chunks(flat: Array, cfg: moe_config.MoEConfig, chunk: int) -> Array:
  chunks = flat.reshape(-1, chunk, flat.shape[-1])
  real = jnp.isfinite(chunks[..., 0]).sum(axis=-1)
  room = jnp.maximum(real * cfg.num_experts_per_tok // cfg.num_experts, 1)
  rank = jnp.argsort(jnp.argsort(-chunks, axis=1), axis=1)
  return ((rank < room[:, None, None]) & jnp.isfinite(chunks)).reshape(flat.shape)


ROUTER = routing.Router(route, router_traits.LIBRARY['expert_choice'], across_rows=True)
