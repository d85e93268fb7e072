"""`rounds.one_round` with plain loops over clients and batches: the reference of the fast one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.federated import client, rounds
from moe_jax.federated import settings as settings_lib

Array = jax.Array


@functools.lru_cache(maxsize=4)
def _programs(settings: settings_lib.Settings):
  """What is compiled: send, begin, step, update, served."""
  parts = (rounds.send, client.begin, client.step, client.update, rounds.served)
  return [jax.jit(functools.partial(part, settings)) for part in parts]


def one_round(
  settings: settings_lib.Settings,
  state: rounds.State,
  data: rounds.Data,
  seed: Array,
  *,
  whole_clients: bool = False,
) -> rounds.State:
  """The state after a round: one client after another, one compiled step per batch.

  Args:
    settings: of the run.
    state: before.
    data: of the seed.
    seed: a typed key.
    whole_clients: compile a client's round as one; else its steps are a loop too.
  """
  send, begin, step, whole, served = _programs(settings)
  sent = send(state, data, seed)
  updates = []
  for i in range(len(sent.chosen)):
    own, samples, key = jax.tree.map(lambda x, i=i: x[i], (sent.own, sent.samples, sent.keys))
    if whole_clients:
      updates.append(whole(sent.broadcast, own, samples, key))
      continue
    received, pick, batches = begin(sent.broadcast, own, samples, key)
    carry = received.params, jax.tree.map(jnp.zeros_like, received.params)
    for j in np.flatnonzero(batches.used.any(axis=1)):
      batch = jax.tree.map(lambda x, j=j: x[j], batches)
      carry = step(sent.broadcast, samples, pick, carry, batch)
    updates.append(received._replace(params=carry[0]))
  return served(state, data, sent, jax.tree.map(lambda *parts: jnp.stack(parts), *updates))
