"""PPRGo, for large graphs: softmax of P MLP(x) with the k largest entries of each row of P.

Training reads the features of the labelled nodes' k nearest by PageRank and nothing else
(arXiv 2007.01570). Afterwards the MLP is applied to every node and its logits are spread by power
iteration.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from moe_jax import errors
from moe_jax.graphs import class_losses, pagerank, structs, totoro


class MLP(nn.Module):
  """Two layers with ReLU and dropout."""

  hidden: int
  num_classes: int
  dropout: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[..., features] -> logits [..., classes]."""
    x = nn.relu(nn.Dense(self.hidden)(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes)(x)


class Settings(NamedTuple):
  """How PPRGo is trained."""

  hidden: int = 32
  dropout: float = 0.1
  learning_rate: float = 5e-3
  epochs: int = 200
  batch_size: int = 512
  top_k: int = 32
  epsilon: float = 1e-4  # of `pagerank.push`
  spread_steps: int = 10  # of power iteration at the end
  restart: float = pagerank.RESTART
  loss: str = 'cross_entropy'


class Batch(NamedTuple):
  """Labelled nodes: the k nodes nearest to each, how near, its class and weight."""

  nearest: Any  # [labelled, k] node numbers
  nearness: Any  # [labelled, k] entries of P
  labels: Any  # [labelled]
  weights: Any  # [labelled]


def prepare(
  graph: structs.Graph,
  labels: np.ndarray,
  train: np.ndarray,
  num_classes: int,
  settings: Settings,
  renode: tuple[float, float] | None = None,
) -> Batch:
  """Returns the labelled nodes with their rows of P, and with ReNode's weights of these rows.

  Args:
    graph: without self-loops.
    labels: [nodes] classes.
    train: [nodes] bool, the labelled nodes.
    num_classes: number of classes.
    settings: of the PageRank.
    renode: smallest and largest weight; None for weights of 1.
  """
  nodes = np.flatnonzero(train)
  rows = pagerank.push(graph, nodes, settings.restart, settings.epsilon)
  nearest, nearness = pagerank.top_k(rows, settings.top_k)
  weights = np.ones(len(nodes), np.float32)
  if renode is not None:
    totoro.check_weights(*renode)
    found = totoro.of_rows(rows, labels[nodes], num_classes)
    everyone = jnp.ones(len(nodes), bool)
    weights = np.asarray(totoro.weights(jnp.asarray(found, jnp.float32), everyone, *renode))
  return Batch(nearest, nearness, labels[nodes], weights)


def logits_of(
  module: MLP, params: Any, features: jax.Array, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
  """[labelled, classes]: the MLP's logits at each node's nearest, weighted by nearness.

  Args:
    module: the network.
    params: its parameters.
    features: [nodes, features].
    batch: the nodes.
    key: of dropout; None for none.
  """
  rngs = None if key is None else {'dropout': key}
  near = module.apply(params, features[batch.nearest], train=key is not None, rngs=rngs)
  return jnp.einsum('bk,bkc->bc', batch.nearness, near)


def fit(
  features: np.ndarray, batch: Batch, num_classes: int, settings: Settings, seed: int
) -> tuple[MLP, Any]:
  """Trains on the labelled nodes; returns the network and its parameters.

  An epoch passes through them once in an order of its own; what is left over of the last batch of
  `batch_size` is passed by in that epoch.
  """
  errors.require(
    settings.loss in class_losses.LOSSES,
    f'loss={settings.loss!r} must be one of {", ".join(class_losses.LOSSES)}',
  )
  module = MLP(settings.hidden, num_classes, settings.dropout)
  params = _fit(module, jnp.asarray(features), jax.tree.map(jnp.asarray, batch), settings, seed)
  return module, params


@functools.partial(jax.jit, static_argnames=('module', 'settings'))
def _fit(module: MLP, features: jax.Array, batch: Batch, settings: Settings, seed: int) -> Any:
  start_key, epochs_key = jax.random.split(jax.random.key(seed))
  params = module.init(start_key, features[:1], train=False)
  adam = optax.adam(settings.learning_rate)
  count = batch.labels.shape[0]
  size = min(settings.batch_size, count)
  sizes = jnp.bincount(batch.labels, length=module.num_classes)

  def loss_fn(params: Any, part: Batch, key: jax.Array) -> jax.Array:
    logits = logits_of(module, params, features, part, key)
    losses = class_losses.per_node(settings.loss, logits, part.labels, sizes)
    return jnp.mean(part.weights * losses)

  def step(carry: tuple, place: tuple) -> tuple:
    params, optimizer = carry
    chosen, key = place
    part = jax.tree.map(lambda leaf: leaf[chosen], batch)
    updates, optimizer = adam.update(jax.grad(loss_fn)(params, part, key), optimizer)
    return (optax.apply_updates(params, updates), optimizer), None

  def epoch(carry: tuple, number: jax.Array) -> tuple:
    order_key, dropout_key = jax.random.split(jax.random.fold_in(epochs_key, number))
    order = jax.random.permutation(order_key, count)[: count // size * size].reshape(-1, size)
    return jax.lax.scan(step, carry, (order, jax.random.split(dropout_key, len(order))))

  (params, _), _ = jax.lax.scan(epoch, (params, adam.init(params)), jnp.arange(settings.epochs))
  return params


def predict(
  module: MLP, params: Any, graph: structs.Graph, features: np.ndarray, settings: Settings
) -> jax.Array:
  """Returns the classes [nodes] of all nodes by power iteration over the MLP's logits."""
  logits: Any = module.apply(params, jnp.asarray(features), train=False)
  spread = pagerank.apply(
    structs.normalized(graph), logits, settings.restart, settings.spread_steps
  )
  return spread.argmax(-1)
