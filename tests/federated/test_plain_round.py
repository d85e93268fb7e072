"""The compiled round against plain loops over clients and batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.federated import partition, plain_round, rounds, settings

CFG = settings.resolve(
  settings.Settings(
    clients=5, clients_per_round=3, epochs=2, batch_size=16, threshold=2, imbalance=8
  )
)


@pytest.mark.parametrize('shared', (True, False))
def test_a_round_is_that_of_plain_loops(images, shared):
  cfg = dataclasses.replace(CFG, shared_extra_head=shared)
  data = rounds.Data(*jax.tree.map(jnp.asarray, partition.federate(images, cfg, 0)))
  key = jax.random.key(0)
  start = state = plain = jax.jit(functools.partial(rounds.init, cfg))(key)
  fast = jax.jit(functools.partial(rounds.one_round, cfg, None))
  drawn = set()
  for number in range(2):  # the second one has prototypes
    sent = rounds.send(cfg, state, data, key)
    drawn |= set(sent.chosen.tolist())
    state = fast(state, data, key)
    plain = plain_round.one_round(cfg, plain, data, key, whole_clients=number == 0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, plain)
  assert int(state.round) == 2 and state.known.any()
  if not shared:  # clients that were not drawn keep their second head
    moved = state.params['extra']['kernel'] != start.params['extra']['kernel']
    assert set(np.flatnonzero(moved.any(axis=(1, 2))).tolist()) == drawn and len(drawn) < 5
