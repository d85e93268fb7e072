"""What the server does with the clients' updates: averages, prototypes, CLIMB's dual variables."""

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.federated import heads
from moe_jax.federated import settings as settings_lib

Array = jax.Array


def sampled_clients(settings: settings_lib.Settings, key: Array) -> Array:
  """The clients of a round in rising order, [clients_per_round]; all of them if all take part."""
  if settings.clients_per_round == settings.clients:
    return jnp.arange(settings.clients)
  return jnp.sort(jax.random.permutation(key, settings.clients)[: settings.clients_per_round])


def averaged(start: trees.Params, trained: trees.Params, weights: Array) -> trees.Params:
  """start + sum of weights * (trained - start): the average, where the weights' sum is 1.

  Args:
    start: what the clients received.
    trained: what they sent, with an axis [clients_per_round] before each.
    weights: [clients_per_round].
  """
  return jax.tree.map(lambda old, new: old + jnp.tensordot(weights, new - old, 1), start, trained)


def gathered_prototypes(
  old: heads.Head, known: Array, gradients: heads.Head, present: Array
) -> tuple[heads.Head, Array]:
  """Plain means over the clients that sent a class; what nobody sent stays what it was.

  Args:
    old: gradients by class.
    known: which of them there are, [classes].
    gradients: of the clients, [clients_per_round, classes, ...].
    present: which classes they sent, [clients_per_round, classes].

  Returns:
    The new gradients by class, and which of them there are.
  """
  sent = present.any(axis=0)
  weights = present / jnp.maximum(present.sum(axis=0), 1)

  def mean(old: Array, new: Array) -> Array:
    shape = (-1,) + (1,) * (old.ndim - 1)
    found = jnp.einsum('kc,kc...->c...', weights, new)
    return jnp.where(sent.reshape(shape), found, old)

  return jax.tree.map(mean, old, gradients), known | sent


def climb(
  settings: settings_lib.Settings, duals: Array, chosen: Array, shares: Array, losses: Array
) -> tuple[Array, Array]:
  """CLIMB: a client whose loss is above the mean by more than the tolerance gains weight.

  Args:
    settings: of the run.
    duals: one per client, [clients].
    chosen: the clients of the round, [clients_per_round].
    shares: of their samples, [clients_per_round].
    losses: of the received model at each, [clients_per_round].

  Returns:
    The weights of this round's average, by the old dual variables, and the new ones.
  """
  weights = shares * (1 + duals[chosen] - duals.mean())
  excess = losses - (shares * losses).sum() - settings.climb_tolerance
  return weights, duals.at[chosen].set(jnp.maximum(duals[chosen] + settings.climb_rate * excess, 0))
