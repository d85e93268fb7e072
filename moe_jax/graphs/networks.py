"""Networks that classify nodes: GCN, GAT, PPNP, APPNP, GraphSAGE, ChebGCN, SGC.

Each is a flax module of (operator, x, train) -> logits [nodes, classes]; `Network.prepare` makes
operator and inputs of a graph and its features once, before training. All are of two layers with
ReLU and dropout between, as in ReNode's authors' code, but for SGC, which is linear.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.graphs import pagerank, structs

HEADS = 4  # of GAT's first layer
CHEBYSHEV_ORDER = 2
SGC_STEPS = 2
APPNP_STEPS = 10
_GLOROT = nn.initializers.glorot_uniform()


class Sizes(NamedTuple):
  """What the modules are built by."""

  hidden: int
  num_classes: int
  dropout: float


def _dense(width: int, name: str, bias: bool = True) -> nn.Dense:
  return nn.Dense(width, use_bias=bias, kernel_init=_GLOROT, name=name)


class TwoLayers(nn.Module):
  """A layer, ReLU, dropout, a layer."""

  sizes: Sizes

  # (operator, [nodes, features], width, number) -> [nodes, width]; each network's own.
  layer: ClassVar[Callable[..., jax.Array]]

  @nn.compact
  def __call__(self, operator: structs.Operator, x: jax.Array, train: bool) -> jax.Array:
    """[nodes, features] -> logits [nodes, classes]."""
    x = nn.relu(self.layer(operator, x, self.sizes.hidden, 0))
    x = nn.Dropout(self.sizes.dropout, deterministic=not train)(x)
    return self.layer(operator, x, self.sizes.num_classes, 1)


class GCN(TwoLayers):
  """A' x W + b (arXiv 1609.02907, equation 2)."""

  def layer(self, operator, x, width, number):
    bias = self.param(f'bias_{number}', nn.initializers.zeros, (width,))
    return structs.propagate(operator, _dense(width, f'dense_{number}', bias=False)(x)) + bias


class SAGE(TwoLayers):
  """x W_self + mean of the neighbours' x, W_mean (arXiv 1706.02216, mean aggregator)."""

  def layer(self, operator, x, width, number):
    mean = structs.propagate(operator, _dense(width, f'mean_{number}', bias=False)(x))
    return _dense(width, f'self_{number}')(x) + mean


class ChebGCN(TwoLayers):
  """sum_k T_k(L - I) x W_k with Chebyshev polynomials T_k (arXiv 1606.09375).

  The largest eigenvalue of the Laplacian L is taken to be 2, its bound.
  """

  def layer(self, operator, x, width, number):
    return sum(
      _dense(width, f'order_{k}_{number}', bias=k == 0)(term)
      for k, term in enumerate(chebyshev_terms(operator, x, CHEBYSHEV_ORDER))
    )


def chebyshev_terms(operator: structs.Operator, x: jax.Array, order: int) -> list[jax.Array]:
  """Returns T_k(L - I) x for k below `order` (at least 2); L - I is minus the operator."""
  terms = [x, -structs.propagate(operator, x)]
  while len(terms) < order:
    terms.append(-2 * structs.propagate(operator, terms[-1]) - terms[-2])
  return terms


class GAT(TwoLayers):
  """Means over neighbours by learned attention (arXiv 1710.10903); the last layer has one head."""

  def layer(self, operator: Any, x, width, number):
    heads = HEADS if number == 0 else 1
    values = _dense(width, f'dense_{number}', bias=False)(x)
    values = values.reshape(len(x), heads, width // heads)
    shape = (1, heads, width // heads)
    sender, receiver = (
      (values * self.param(f'{end}_{number}', _GLOROT, shape)).sum(-1)
      for end in ('sender', 'receiver')
    )
    attention = _softmax_at_receivers(
      operator, nn.leaky_relu(sender[operator.senders] + receiver[operator.receivers], 0.2)
    )
    mixed = structs.sum_at_receivers(operator, attention[..., None] * values[operator.senders])
    bias = self.param(f'bias_{number}', nn.initializers.zeros, (width,))
    return mixed.reshape(len(x), width) + bias


def _softmax_at_receivers(graph: structs.Graph, scores: jax.Array) -> jax.Array:
  """[edges, heads] -> the same, summing to 1 over the edges into a node."""
  most = jax.ops.segment_max(scores, graph.receivers, graph.num_nodes, indices_are_sorted=True)
  raised = jnp.exp(scores - jax.lax.stop_gradient(most)[graph.receivers])
  return raised / structs.sum_at_receivers(graph, raised)[graph.receivers]


class PPNP(nn.Module):
  """P MLP(x): predictions of the features alone, spread by PageRank (arXiv 1810.05997)."""

  sizes: Sizes

  @nn.compact
  def __call__(self, operator: structs.Operator, x: jax.Array, train: bool) -> jax.Array:
    """[nodes, features] -> logits [nodes, classes]."""
    x = nn.relu(_dense(self.sizes.hidden, 'dense_0')(x))
    x = nn.Dropout(self.sizes.dropout, deterministic=not train)(x)
    return self.spread(operator, _dense(self.sizes.num_classes, 'dense_1')(x))

  def spread(self, operator: structs.Operator, x: jax.Array) -> jax.Array:
    """Returns P x, with P the operator."""
    return structs.propagate(operator, x)


class APPNP(PPNP):
  """PPNP by steps of power iteration: no matrix [nodes, nodes]."""

  def spread(self, operator, x):
    return pagerank.apply(operator, x, steps=APPNP_STEPS)


class SGC(nn.Module):
  """One dense layer of A' A' x (arXiv 1902.07153), which is computed once."""

  sizes: Sizes

  @nn.compact
  def __call__(self, operator: structs.Operator, x: jax.Array, train: bool) -> jax.Array:
    """[nodes, features] -> logits [nodes, classes]."""
    return _dense(self.sizes.num_classes, 'dense')(x)


class Network(NamedTuple):
  """A module, and what it is given of a graph: (graph, features) -> (operator, inputs)."""

  module: Callable[[Sizes], nn.Module]
  prepare: Callable[[structs.Graph, jax.Array], tuple[Any, jax.Array]]


def _sgc_inputs(graph: structs.Graph, x: jax.Array) -> tuple[tuple, jax.Array]:
  adjacency = structs.normalized(graph)
  for _ in range(SGC_STEPS):
    x = structs.propagate(adjacency, x)
  return (), x


NETWORKS = {
  'gcn': Network(GCN, lambda graph, x: (structs.normalized(graph), x)),
  'gat': Network(GAT, lambda graph, x: (structs.with_self_loops(graph), x)),
  'ppnp': Network(PPNP, lambda graph, x: (pagerank.exact(structs.normalized(graph)), x)),
  'appnp': Network(APPNP, lambda graph, x: (structs.normalized(graph), x)),
  'sage': Network(SAGE, lambda graph, x: (structs.mean_of_neighbors(graph), x)),
  'cheb': Network(ChebGCN, lambda graph, x: (structs.symmetric(graph), x)),
  'sgc': Network(SGC, _sgc_inputs),
}
