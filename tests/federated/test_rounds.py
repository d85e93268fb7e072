"""Rounds as pure functions: over seeds, devices and calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.federated import partition, rounds, run, settings

CFG = settings.resolve(
  settings.Settings(
    clients=8, clients_per_round=4, epochs=2, batch_size=16, threshold=2, imbalance=8
  )
)


def made(images, cfg, seed=0) -> tuple[rounds.State, rounds.Data, jax.Array]:
  key = jax.random.key(seed)
  found = partition.federate(images, cfg, seed)
  data = rounds.Data(*jax.tree.map(jnp.asarray, found))
  return jax.jit(functools.partial(rounds.init, cfg))(key), data, key


@functools.cache
def compiled(cfg, mesh=None):
  return jax.jit(functools.partial(rounds.one_round, cfg, mesh))


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), a, b)


def test_lambda_zero_is_federated_averaging_of_two_heads(images):
  cfg = dataclasses.replace(CFG, correction=0.0)
  state, data, key = made(images, cfg)
  plain = dataclasses.replace(cfg, method='head_only')
  found, expected = (
    [compiled(one)(compiled(one)(state, data, key), data, key)] for one in (cfg, plain)
  )
  close(found, expected, 1e-6)
  corrected = compiled(CFG)(compiled(CFG)(state, data, key), data, key)
  assert (abs(corrected.params['main']['kernel'] - found[0].params['main']['kernel']) > 1e-3).any()


def test_rounds_depend_on_seed_and_number_alone(images):
  state, data, key = made(images, CFG)
  step = compiled(CFG)
  once = step(state, data, key)
  jax.tree.map(np.testing.assert_array_equal, once, step(state, data, key))
  later = step(state._replace(round=jnp.int32(1)), data, key)
  other = step(state, data, jax.random.key(1))
  kernel = once.params['main']['kernel']
  assert (kernel != later.params['main']['kernel']).any()
  assert (kernel != other.params['main']['kernel']).any()


def test_seeds_together_are_the_seeds_alone(images):
  each = [made(images, CFG, seed) for seed in (0, 1)]
  states, data, keys = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
  together, right = rounds.advance(CFG, None, 2)(states, data, keys)
  for i, (state, own, key) in enumerate(each):
    alone = compiled(CFG)(compiled(CFG)(state, own, key), own, key)
    close(jax.tree.map(lambda x, i=i: x[i], together), alone)
    found = rounds.right_by_class(CFG, alone, own)
    assert right[i].tolist() == found.tolist() and found.sum() > 4


def test_devices_change_nothing(images):
  state, data, key = made(images, CFG)
  mesh = run.client_mesh(4, CFG.clients_per_round)
  assert mesh is not None and mesh.axis_names == ('clients',) and mesh.size == 4
  split = compiled(CFG, mesh)(state, data, key)
  close(split, compiled(CFG)(state, data, key), 1e-6)


@pytest.mark.parametrize('method', ('ratio', 'climb', 'creff'))
def test_what_the_server_remembers(images, method):
  cfg = dataclasses.replace(
    CFG, method=method, climb_tolerance=0.0, server_samples=4, creff_epochs=2, creff_features=6,
    creff_feature_steps=2,
  )  # fmt: skip
  state, data, key = made(images, cfg)
  found = compiled(cfg)(state, data, key)
  changed = {
    name
    for name in ('class_weights', 'duals', 'features')
    if (getattr(found, name) != getattr(state, name)).any()
  }
  assert changed == {{'ratio': 'class_weights', 'climb': 'duals', 'creff': 'features'}[method]}
  assert (found.retrained['kernel'] != state.retrained['kernel']).any() == (method == 'creff')
  if method == 'creff':  # it answers with the new head
    other = found._replace(
      params=found.params | {'main': jax.tree.map(jnp.zeros_like, found.params['main'])}
    )
    assert (
      rounds.right_by_class(cfg, found, data).tolist()
      == rounds.right_by_class(cfg, other, data).tolist()
    )
