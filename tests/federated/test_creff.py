import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.federated import creff, heads, settings

CFG = settings.resolve(
  settings.Settings(method='creff', creff_feature_steps=30, creff_feature_rate=1.0, creff_epochs=20)
)
RNG = np.random.default_rng(0)
HEAD = {'kernel': jnp.array(RNG.normal(size=(5, 3))), 'bias': jnp.zeros(3)}
REAL = jnp.array(RNG.normal(size=(12, 5)))
LABELS = jnp.arange(12) % 3


@functools.cache
def targets() -> heads.Head:
  means, _ = heads.class_means(LABELS, jnp.ones(12, bool), 3)
  return jax.jit(heads.weighted_gradients)(HEAD, REAL, LABELS, means)


def test_the_distance_is_nothing_where_the_gradients_are_the_same():
  known, distance = jnp.ones(3, bool), jax.jit(creff.distance)
  same = jnp.stack([REAL[c::3] for c in range(3)])
  assert abs(distance(HEAD, same, targets(), known)) < 1e-5
  doubled = jax.tree.map(lambda g: 2 * g, targets())  # its angle counts, not its length
  assert abs(distance(HEAD, same, doubled, known)) < 1e-5
  turned = jax.tree.map(
    lambda g: g * jnp.array([1, -1, 1]).reshape(3, *[1] * (g.ndim - 1)), targets()
  )
  np.testing.assert_allclose(distance(HEAD, same, turned, known), 2, rtol=1e-4)
  assert abs(distance(HEAD, same, turned, jnp.array([True, False, True]))) < 1e-5
  assert distance(HEAD, same, targets() | {'bias': -targets()['bias']}, known) > 0.05


def test_features_come_nearer_and_those_of_unknown_classes_stay():
  start, known = jnp.array(RNG.normal(size=(3, 6, 5))), jnp.array([True, True, False])
  found = jax.jit(functools.partial(creff.refined, CFG))(HEAD, start, targets(), known)
  before, after = (creff.distance(HEAD, f, targets(), known) for f in (start, found))
  assert after < 0.3 * before
  assert (found[2] == start[2]).all() and (found[:2] != start[:2]).any()


def test_the_new_head_tells_the_features_apart():
  features = jnp.array(RNG.normal(size=(3, 40, 5))) + 4 * jnp.eye(3, 5)[:, None]
  train = jax.jit(functools.partial(creff.retrained, CFG))
  head = train(features, jax.random.key(0))
  named = heads.logits(head, features.reshape(-1, 5)).argmax(axis=1)
  assert (named == jnp.repeat(jnp.arange(3), 40)).mean() > 0.95
  few = dataclasses.replace(CFG, creff_epochs=1)
  once = creff.retrained(few, features, jax.random.key(0))
  assert jnp.linalg.norm(once['kernel']) < jnp.linalg.norm(head['kernel'])
