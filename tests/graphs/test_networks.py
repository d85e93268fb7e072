import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.graphs import networks, pagerank, structs
from tests.graphs import graph_cases

SIZES = networks.Sizes(hidden=8, num_classes=3, dropout=0.5)
X = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def weights(module, operator, x):
  """Random ones, biases too, in the structure of the module's."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), operator, x, train=False))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)


def relu(x):
  return np.maximum(x, 0)


def matrices(graph):
  a = np.asarray(structs.dense(graph), np.float64)
  looped = a + np.eye(12)
  root = np.sqrt(looped.sum(1))
  degree = np.maximum(a.sum(1), 1)
  return {
    'gcn': looped / root[:, None] / root,
    'mean': a / degree[:, None],
    'symmetric': a / np.sqrt(degree)[:, None] / np.sqrt(degree),
    'looped': looped,
  }


def gat_layer(p, looped, x, number, heads):
  values = (x @ p[f'dense_{number}']['kernel']).reshape(12, heads, -1)
  out = np.zeros_like(values)
  for h in range(heads):
    sender = (values[:, h] * p[f'sender_{number}'][0, h]).sum(-1)
    receiver = (values[:, h] * p[f'receiver_{number}'][0, h]).sum(-1)
    scores = receiver[:, None] + sender[None]
    scores = np.where(scores > 0, scores, 0.2 * scores)
    raised = np.exp(scores) * (looped > 0)
    out[:, h] = raised / raised.sum(1, keepdims=True) @ values[:, h]
  return out.reshape(12, -1) + p[f'bias_{number}']


def expected(name, p, m, x):
  """Logits with dense matrices in numpy."""
  if name == 'gcn':
    h = relu(m['gcn'] @ (x @ p['dense_0']['kernel']) + p['bias_0'])
    return m['gcn'] @ (h @ p['dense_1']['kernel']) + p['bias_1']
  if name in ('sage', 'cheb'):
    first, second, matrix = (
      ('self', 'mean', m['mean']) if name == 'sage' else ('order_0', 'order_1', -m['symmetric'])
    )
    for i in (0, 1):
      own = p[f'{first}_{i}']
      x = x @ own['kernel'] + own['bias'] + matrix @ x @ p[f'{second}_{i}']['kernel']
      x = relu(x) if i == 0 else x
    return x
  if name == 'gat':
    h = relu(gat_layer(p, m['looped'], x, 0, 4))
    return gat_layer(p, m['looped'], h, 1, 1)
  if name == 'sgc':
    return m['gcn'] @ m['gcn'] @ x @ p['dense']['kernel'] + p['dense']['bias']
  h = relu(x @ p['dense_0']['kernel'] + p['dense_0']['bias'])
  h = h @ p['dense_1']['kernel'] + p['dense_1']['bias']
  if name == 'ppnp':
    return 0.15 * np.linalg.solve(np.eye(12) - 0.85 * m['gcn'], h)
  z = h
  for _ in range(10):
    z = 0.85 * m['gcn'] @ z + 0.15 * h
  return z


@pytest.mark.parametrize('name', networks.NETWORKS)
def test_a_network_is_its_formula(name):
  graph = graph_cases.random_graph()
  network = networks.NETWORKS[name]
  operator, inputs = network.prepare(graph, jnp.asarray(X))
  module = network.module(SIZES)
  params = weights(module, operator, inputs)
  found = module.apply(params, operator, inputs, train=False)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params['params'])
  np.testing.assert_allclose(found, expected(name, p, matrices(graph), X), rtol=2e-4, atol=2e-4)


def test_a_dense_matrix_gives_the_same_gradient():
  graph = structs.normalized(graph_cases.random_graph())
  module = networks.GCN(SIZES)
  params = weights(module, graph, X)

  def loss(params, operator):
    return jnp.sum(jnp.sin(module.apply(params, operator, jnp.asarray(X), train=False)))

  sparse, full = (jax.grad(loss)(params, operator) for operator in (graph, structs.dense(graph)))
  for a, b in zip(jax.tree.leaves(sparse), jax.tree.leaves(full)):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_dropout_is_of_training_alone():
  graph = structs.normalized(graph_cases.random_graph())
  module = networks.GCN(SIZES)
  params = weights(module, graph, X)
  key = {'dropout': jax.random.key(0)}
  plain = module.apply(params, graph, X, train=False)
  assert (np.asarray(module.apply(params, graph, X, train=True, rngs=key)) != plain).any()


def test_chebyshev_terms_of_higher_order():
  graph = structs.symmetric(graph_cases.random_graph())
  scaled = -np.asarray(structs.dense(graph), np.float64)
  want = [np.eye(12), scaled, 2 * scaled @ scaled - np.eye(12)]
  want.append(2 * scaled @ want[2] - scaled)
  for found, matrix in zip(networks.chebyshev_terms(graph, X, 4), want, strict=True):
    np.testing.assert_allclose(found, matrix @ X, atol=1e-4)


def test_appnp_nears_ppnp(monkeypatch):
  monkeypatch.setattr(networks, 'APPNP_STEPS', 80)
  graph = structs.normalized(graph_cases.random_graph())
  module = networks.PPNP(SIZES)
  p = pagerank.exact(graph)
  params = weights(module, p, X)
  near = networks.APPNP(SIZES).apply(params, graph, jnp.asarray(X), train=False)
  np.testing.assert_allclose(near, module.apply(params, p, X, train=False), atol=1e-4)
