"""What the commands share: splits, Totoro and training of one network on one graph."""

import functools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.graphs import dataset, fit, metrics, networks, pagerank, pprgo, splits, structs, totoro

PPRGO = 'pprgo'
MODELS = (*networks.NETWORKS, PPRGO)


class Labels(NamedTuple):
  """Which nodes are labelled."""

  per_class: int = splits.PER_CLASS
  valid_per_class: int = splits.VALID_PER_CLASS
  imbalance: float = 1.0  # labels of a head class over those of a tail class; 1: per_class for all
  label_share: float = 0.01  # of all nodes, where imbalance is above 1


class Weighting(NamedTuple):
  """ReNode's weights."""

  w_min: float = 0.5
  w_max: float = 1.5
  restart: float = pagerank.RESTART
  tolerance: float = 1e-5  # of a column under PageRank
  ranks: str = 'all'  # among all labelled nodes, or those of a node's 'class'


def split(data: dataset.Dataset, labels: Labels, seeds: Sequence[int]) -> splits.Split:
  """Returns masks [splits, nodes] of the seeds' splits."""
  found = [
    splits.balanced(data.labels, seed, labels.per_class, labels.valid_per_class)
    if labels.imbalance == 1
    else splits.stepped(
      data.labels, seed, labels.imbalance, labels.label_share,
      valid_per_class=labels.valid_per_class,
    )
    for seed in seeds
  ]  # fmt: skip
  return splits.Split(*map(np.stack, zip(*found)))


def totoros(data: dataset.Dataset, train: np.ndarray, weighting: Weighting) -> jax.Array:
  """Returns T [splits, nodes] of labelled nodes [splits, nodes] by power iteration."""
  totoro.check_weights(weighting.w_min, weighting.w_max)
  steps = pagerank.steps_for(weighting.restart, weighting.tolerance)
  adjacency, labels = structs.normalized(data.graph), jnp.asarray(data.labels)
  return _totoros(adjacency, labels, train, weighting.restart, steps, data.num_classes)


def renode(
  data: dataset.Dataset, found: jax.Array, train: np.ndarray, weighting: Weighting
) -> np.ndarray:
  """Returns ReNode's weights [splits, nodes] of T and labelled nodes, both [splits, nodes]."""
  w_min, w_max = weighting.w_min, weighting.w_max

  def one(conflict: jax.Array, chosen: jax.Array) -> jax.Array:
    if weighting.ranks == 'class':
      return totoro.weights_within_classes(
        conflict, jnp.asarray(data.labels), chosen, data.num_classes, w_min, w_max
      )
    return totoro.weights(conflict, chosen, w_min, w_max)

  return np.asarray(jax.vmap(one)(found, jnp.asarray(train)))


@functools.partial(jax.jit, static_argnames=('steps', 'num_classes'))
def _totoros(
  adjacency: structs.Graph,
  labels: jax.Array,
  train: jax.Array,
  restart: float,
  steps: int,
  num_classes: int,
) -> jax.Array:
  def spread(x: jax.Array) -> jax.Array:
    return pagerank.apply(adjacency, x, restart, steps)

  return jax.lax.map(lambda chosen: totoro.of_nodes(spread, labels, chosen, num_classes), train)


def train(
  data: dataset.Dataset,
  model: str,
  chosen: splits.Split,
  weights: np.ndarray,
  seeds: Sequence[int],
  settings: fit.Settings,
  schedule: fit.Schedule,
  together: int = 1,
  prepared: Any = None,
) -> dict[str, list[float]]:
  """Trains a network on every split from every start; returns figures per split, means over starts.

  Args:
    data: the graph.
    model: a key of `networks.NETWORKS`.
    chosen: masks [splits, nodes].
    weights: [splits, nodes] of labelled nodes.
    seeds: of starts.
    settings: of the training.
    schedule: of the rate.
    together: runs side by side in the compiled program.
    prepared: what the network's `prepare` gave, if it was called before.
  """
  num = len(chosen.train)
  if prepared is None:
    prepared = networks.NETWORKS[model].prepare(data.graph, jnp.asarray(data.features))
  every = [np.repeat(mask, len(seeds), 0) for mask in (chosen.train, chosen.valid, weights)]
  runs = fit.Runs(np.tile(np.asarray(seeds, np.int32), num), *every)
  labels = jnp.asarray(data.labels)
  found = fit.fit(model, prepared, labels, data.num_classes, runs, settings, schedule, together)
  weighted, macro = _f1(
    found.predicted, labels, np.repeat(chosen.test, len(seeds), 0), data.num_classes
  )
  figures = {
    'weighted_f1': weighted,
    'macro_f1': macro,
    'train_accuracy': found.train_accuracy,
    'best_epoch': found.best_epoch,
    'epochs': found.epochs,
  }
  return {
    name: np.asarray(values, float).reshape(num, -1).mean(1).round(5).tolist()
    for name, values in figures.items()
  }


@functools.partial(jax.jit, static_argnames='num_classes')
def _f1(predicted, labels, chosen, num_classes):
  return jax.vmap(lambda said, mask: metrics.f1(said, labels, mask, num_classes))(predicted, chosen)


def train_pprgo(
  data: dataset.Dataset,
  chosen: splits.Split,
  renode: tuple[float, float] | None,
  seeds: Sequence[int],
  settings: pprgo.Settings,
) -> dict[str, list[float]]:
  """`train` of PPRGo, whose rows of PageRank differ by split."""
  rows = []
  for train_mask, _, test in zip(*chosen):
    batch = pprgo.prepare(data.graph, data.labels, train_mask, data.num_classes, settings, renode)
    starts = []
    for seed in seeds:
      module, params = pprgo.fit(data.features, batch, data.num_classes, settings, seed)
      said = pprgo.predict(module, params, data.graph, data.features, settings)
      labels = jnp.asarray(data.labels)
      starts.append(
        [*metrics.f1(said, labels, test, data.num_classes),
         metrics.accuracy(said, labels, train_mask)]
      )  # fmt: skip
    rows.append([statistics.fmean(map(float, values)) for values in zip(*starts)])
  names = ('weighted_f1', 'macro_f1', 'train_accuracy')
  return {name: [round(row[i], 5) for row in rows] for i, name in enumerate(names)}


def correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
  """Returns Pearson's correlation with its 95 % interval by Fisher's z; needs 4 pairs."""
  r = float(np.corrcoef(first, second)[0, 1])
  half = 1.959964 / np.sqrt(len(first) - 3)
  low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
  return r, float(low), float(high)
