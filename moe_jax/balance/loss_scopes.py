"""The tokens that a balance loss averages over: a sequence, a forward pass or the whole batch.

A loss of scope micro_batch is of a whole forward pass, also where a pipeline makes it in parts
(`added_up`).

With gradient accumulation a loss of scope global_batch is no sum over micro-batches. It then
becomes its linear part around the whole batch (`global_slopes`), whose gradients do add up.
Losses are returned times the number of tokens, so that sequences, micro-batches and devices add up.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.balance import balance_losses, router_stats
from moe_jax.config import moe_config

Array = jax.Array


def _weighted(
  fn: Callable, s: router_stats.Sums | router_stats.MixtureSums, moe: moe_config.MoEConfig
) -> Array:
  return (fn(s, moe) * s.num_tokens).sum()


def scoped(
  fn: Callable,
  moe: moe_config.MoEConfig,
  scope: str,
  per_sequence: router_stats.Sums | router_stats.MixtureSums,
  slopes: Mapping[str, Array] | None,
) -> Array:
  """A loss of one layer times the number of tokens, [] float32, before its weight.

  Args:
    fn: the loss, a function of sums.
    moe: settings that it may read.
    scope: one of moe_config.LOSS_SCOPES.
    per_sequence: sums of the rows of a forward pass, leading axis B.
    slopes: None, or the entry of `global_slopes`: a loss of scope global_batch then becomes its
      linear part around the whole batch, whose gradients add up to the loss's over micro-batches.
  """
  if scope == 'sequence':
    return _weighted(fn, per_sequence, moe)
  total = router_stats.add_up(per_sequence)
  if scope == 'global_batch' and slopes is not None:
    return _along(slopes, total)
  return _weighted(fn, total, moe)


def layer_losses(
  moe: moe_config.MoEConfig,
  per_sequence: router_stats.Sums,
  slopes: Mapping[str, Mapping[str, Array]],
) -> dict[str, Array]:
  """All of `LOSSES` for one layer, by name; see `scoped`."""
  return {
    name: scoped(fn, moe, moe.loss(name).scope, per_sequence, slopes.get(name))
    for name, fn in balance_losses.LOSSES.items()
  }


def _split(
  s: router_stats.Sums | router_stats.MixtureSums,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """(fields that carry gradients, counts)."""
  fields = s._asdict()
  real = {k: v for k, v in fields.items() if jnp.issubdtype(v.dtype, jnp.floating)}
  return real, {k: v for k, v in fields.items() if k not in real}


def _slopes_of(
  fn: Callable, s: router_stats.Sums | router_stats.MixtureSums, moe: moe_config.MoEConfig
) -> dict[str, Array]:
  """Gradient of num_tokens * fn with respect to the real-valued sums, summed over leading axes."""
  real, counts = _split(s)
  return jax.grad(lambda real: _weighted(fn, type(s)(**real, **counts), moe))(real)


def _along(slopes: Mapping[str, Array], s: router_stats.Sums | router_stats.MixtureSums) -> Array:
  """The inner product of slopes (constants for autodiff) and the real-valued sums."""
  real, _ = _split(s)
  parts = (jnp.vdot(jax.lax.stop_gradient(slopes[k]), v) for k, v in real.items())
  return jnp.asarray(sum(parts))


def global_slopes(
  moe: moe_config.MoEConfig, stats: router_stats.RouterStats
) -> dict[str, dict[str, Array]]:
  """Slopes of all losses of scope global_batch.

  Args:
    moe: the scopes.
    stats: of the whole batch, leaves [layers, ...].

  Returns:
    {name: {field of Sums: array of its shape}}; empty if no loss has that scope.
  """
  wanted = [name for name in moe_config.LOSSES if moe.loss(name).scope == 'global_batch']
  slopes = {
    k: _slopes_of(balance_losses.LOSSES[k], stats.sums, moe)
    for k in wanted
    if k in balance_losses.LOSSES
  }
  if 'attention_mutual_information' in wanted and stats.attention is not None:
    slopes['attention_mutual_information'] = _slopes_of(
      balance_losses.mutual_information, stats.attention, moe
    )
  return slopes


def refreshed(
  moe: moe_config.MoEConfig, stats: router_stats.RouterStats
) -> router_stats.RouterStats:
  """`stats` of a whole batch with the true values of its losses of scope global_batch.

  After accumulation those hold sums of linear parts, right in their gradient only.
  """
  return _anew(moe, stats, ('global_batch',), {})


def added_up(
  moe: moe_config.MoEConfig,
  stats: router_stats.RouterStats,
  slopes: Mapping[str, Mapping[str, Array]],
) -> router_stats.RouterStats:
  """`stats` of a forward pass that was made in parts, with the losses of all its rows together.

  Args:
    moe: the scopes.
    stats: sums over the parts, leaves [layers, ...]; gradients flow through them.
    slopes: see `scoped`; leaves [layers, ...].
  """
  return _anew(moe, stats, ('micro_batch', 'global_batch'), slopes)


def _anew(
  moe: moe_config.MoEConfig,
  stats: router_stats.RouterStats,
  scopes: tuple[str, ...],
  slopes: Mapping[str, Mapping[str, Array]],
) -> router_stats.RouterStats:
  """`stats` with the losses of these scopes made of its sums, leaves [layers, ...]."""
  losses = dict(stats.losses)
  for name in losses:
    if moe.loss(name).scope not in scopes:
      continue
    if name in balance_losses.LOSSES:
      value, sums = balance_losses.LOSSES[name](stats.sums, moe), stats.sums
    else:
      assert stats.attention is not None, name
      sums = stats.attention
      value = balance_losses.mutual_information(sums, moe)
    losses[name] = value * sums.num_tokens
    if name in slopes:
      losses[name] = jax.vmap(_along)(slopes[name], sums)
  return stats.replace(losses=losses)
