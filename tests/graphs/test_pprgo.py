import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import block_model, pagerank, pprgo, structs, totoro

SETTINGS = pprgo.Settings(hidden=8, epochs=30, batch_size=8, top_k=60, epsilon=1e-6)


def case():
  data = block_model.sample(60, 0, num_classes=3, signal=2.0)
  return data, np.arange(60) % 3 == 0


def test_logits_with_all_neighbours_are_the_exact_ones():
  data, train = case()
  batch = pprgo.prepare(data.graph, data.labels, train, 3, SETTINGS)
  assert (batch.weights == 1).all() and (batch.labels == data.labels[train]).all()
  module = pprgo.MLP(8, 3, 0.1)
  params = module.init(jax.random.key(0), data.features[:1], train=False)
  found = pprgo.logits_of(module, params, jnp.asarray(data.features), batch)
  p = pagerank.exact(structs.normalized(data.graph))
  want = p[train] @ module.apply(params, data.features, train=False)
  np.testing.assert_allclose(found, want, atol=1e-4)


def test_weights_are_those_of_the_rows():
  data, train = case()
  batch = pprgo.prepare(data.graph, data.labels, train, 3, SETTINGS, renode=(0.5, 1.5))
  p = pagerank.exact(structs.normalized(data.graph))
  conflict = totoro.of_nodes(lambda x: p @ x, data.labels, train, 3)
  want = totoro.weights(conflict, train)[train]
  np.testing.assert_allclose(batch.weights, want, atol=1e-3)
  assert batch.weights.max() == 1.5 and batch.weights.min() == pytest.approx(0.5)
  with pytest.raises(errors.InputError, match='w_min=2'):
    pprgo.prepare(data.graph, data.labels, train, 3, SETTINGS, renode=(2, 1))


def test_it_learns_and_its_weights_matter():
  data, train = case()
  batch = pprgo.prepare(data.graph, data.labels, train, 3, SETTINGS)
  module, params = pprgo.fit(data.features, batch, 3, SETTINGS, seed=0)
  said = pprgo.predict(module, params, data.graph, data.features, SETTINGS)
  assert (np.asarray(said) == data.labels)[~train].mean() > 0.9
  # Without weight on class 0, nothing is learned of it.
  without = batch._replace(weights=(batch.labels != 0).astype(np.float32))
  _, params = pprgo.fit(data.features, without, 3, SETTINGS, seed=0)
  said = np.asarray(pprgo.predict(module, params, data.graph, data.features, SETTINGS))
  assert (said[data.labels == 0] == 0).mean() < 0.5


def test_an_unknown_loss_is_refused():
  data, train = case()
  batch = pprgo.prepare(data.graph, data.labels, train, 3, SETTINGS)
  with pytest.raises(errors.InputError, match="loss='x' must be one of"):
    pprgo.fit(data.features, batch, 3, SETTINGS._replace(loss='x'), seed=0)
