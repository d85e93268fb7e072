import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.federated import server, settings

CFG = settings.resolve(settings.Settings(clients=6, clients_per_round=3))


def test_the_average_is_weighted():
  start = {'w': np.array([1.0, 2.0])}
  trained = {'w': np.array([[3.0, 2.0], [1.0, 6.0]])}
  found = server.averaged(start, trained, np.array([0.75, 0.25]))
  np.testing.assert_allclose(found['w'], [2.5, 3.0])  # 0.75 * 3 + 0.25 * 1, 0.75 * 2 + 0.25 * 6
  half = server.averaged(start, trained, np.array([0.5, 0.0]))
  np.testing.assert_allclose(half['w'], [2.0, 2.0])  # half a step, not half of the weights


def test_prototypes_are_plain_means_of_those_who_sent_them():
  old = {'kernel': np.full((3, 2, 3), 7.0), 'bias': np.full((3, 3), 7.0)}
  known = np.array([False, True, True])
  sent = np.array([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]])  # by client and class
  gradients = {
    'kernel': np.broadcast_to(sent[..., None, None], (2, 3, 2, 3)),
    'bias': np.broadcast_to(sent[..., None], (2, 3, 3)),
  }
  present = np.array([[True, True, False], [True, False, False]])
  found, now = jax.jit(server.gathered_prototypes)(old, known, gradients, present)
  # Class 0: (1 + 5) / 2; class 1: 2 of one client; class 2: nobody's, so what it was.
  np.testing.assert_allclose(found['bias'], np.outer([3, 2, 7], np.ones(3)))
  np.testing.assert_allclose(found['kernel'][:, 1, 2], [3, 2, 7])
  assert now.all()
  alone = server.gathered_prototypes(old, known & False, gradients, present)[1]
  assert alone.tolist() == [True, True, False]


def test_climb_by_hand():
  cfg = dataclasses.replace(CFG, climb_rate=0.5, climb_tolerance=0.1)
  duals, chosen = jnp.array([0.3, 0, 0, 0, 0, 0.9]), np.array([0, 2, 5])
  shares, losses = np.array([0.5, 0.25, 0.25]), np.array([1.0, 2.0, 0.0])
  weights, found = server.climb(cfg, duals, chosen, shares, losses)
  # The mean of the duals is 0.2, of the losses 1.
  np.testing.assert_allclose(weights, [0.5 * 1.1, 0.25 * 0.8, 0.25 * 1.7], rtol=1e-6)
  np.testing.assert_allclose(
    found, [0.25, 0, 0.45, 0, 0, 0.35], rtol=1e-5
  )  # 0.3 - 0.05; 0.5 * 0.9; 0.9 + 0.5 * -1.1


def test_the_clients_of_a_round():
  draw = jax.jit(lambda key: server.sampled_clients(CFG, key))
  found = [tuple(draw(jax.random.key(i)).tolist()) for i in range(12)]
  assert all(len(set(one)) == 3 and one == tuple(sorted(one)) for one in found)
  assert set().union(*found) == set(range(6)) and len(set(found)) > 4
  everyone = dataclasses.replace(CFG, clients_per_round=6)
  assert server.sampled_clients(everyone, jax.random.key(0)).tolist() == list(range(6))
