"""Seconds of ReNode's weights and of a training epoch against the number of nodes.

python -m experiments.topology.speed [--nodes=1000,3000,10000,30000,100000] [--dense_nodes=3000]
  [--out=experiments/topology]

On block graphs with 20 labelled nodes per class: Totoro by power iteration (tolerance 1e-5), by
pushed rows of the labelled nodes, and by the dense inverse of the authors' code; an epoch of GCN
with ReNode's weights over edges, and the same over a dense adjacency. Dense ones stop at
--dense_nodes. Best of --repeats, taken in turns. Writes speed.json and speed.png.
"""

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.common import cli
from moe_jax import atomic_files, errors

SPARSE, DENSE = 'epoch, edges', 'epoch, dense'
POWER, PUSH, EXACT = 'Totoro, power iteration', 'Totoro, pushed rows', 'Totoro, inverse'


def define_flags():
  """Defines the command's flags."""
  flags.DEFINE_list('nodes', ['1000', '3000', '10000', '30000', '100000'], 'sizes of graphs')
  flags.DEFINE_integer('dense_nodes', 3000, 'largest graph with a dense matrix')
  flags.DEFINE_integer('repeats', 3, 'times that everything is measured')
  cli.path_flag('out', 'experiments/topology', 'directory of speed.json and speed.png')


def main(argv: Sequence[str]):
  """Measures, prints, writes."""
  del argv
  values = flags.FLAGS
  try:
    sizes = [int(word) for word in values.nodes]
  except ValueError as e:
    raise errors.InputError(f'--nodes={",".join(values.nodes)} must be whole numbers') from e
  errors.require(values.repeats >= 1, f'--repeats={values.repeats} must be at least 1')
  rows = []
  for size in sizes:
    rows.append({'nodes': size} | measure(size, size <= values.dense_nodes, values.repeats))
    print(line(rows[-1]), flush=True)
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out / 'speed.json', json.dumps(rows, indent=1) + '\n')
  draw(rows, out / 'speed.png')


def measure(size: int, with_dense: bool, repeats: int) -> dict[str, float]:
  """Returns the edges, and the best seconds of every way."""
  from moe_jax.graphs import block_model, splits

  data = block_model.sample(size, 0)
  train = splits.balanced(data.labels, 0).train
  ways = _ways(data, train, with_dense)
  for call in ways.values():
    call()  # compiles
  seconds = {name: [] for name in ways}
  for _ in range(repeats):
    for name, call in ways.items():
      begin = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - begin)
  best = {name: round(min(found), 6) for name, found in seconds.items()}
  return {'edges': data.graph.num_edges // 2} | best


def _ways(data: Any, train: Any, with_dense: bool) -> dict[str, Callable[[], object]]:
  import jax
  import jax.numpy as jnp
  import numpy as np

  from experiments.topology import trials
  from moe_jax.graphs import pagerank, pprgo, structs, totoro

  weighting, labels = trials.Weighting(), jnp.asarray(data.labels)
  weights = totoro.weights(trials.totoros(data, train[None], weighting)[0], train)
  adjacency = structs.normalized(data.graph)
  nodes = np.flatnonzero(train)

  @jax.jit
  def inverse(adjacency: structs.Graph) -> jax.Array:
    p = pagerank.exact(adjacency, weighting.restart)
    return totoro.of_nodes(lambda x: p @ x, labels, train, data.num_classes)

  def push() -> np.ndarray:
    rows = pagerank.push(data.graph, nodes, weighting.restart, pprgo.Settings().epsilon)
    return totoro.of_rows(rows, data.labels[nodes], data.num_classes)

  ways: dict[str, Callable[[], object]] = {
    SPARSE: _epoch(data, adjacency, train, weights),
    POWER: lambda: trials.totoros(data, train[None], weighting).block_until_ready(),
    PUSH: push,
  }
  if with_dense:
    ways[DENSE] = _epoch(data, structs.dense(adjacency), train, weights)
    ways[EXACT] = lambda: inverse(adjacency).block_until_ready()
  return ways


def _epoch(data: Any, operator: Any, train: Any, weights: Any) -> Callable[[], object]:
  """A function that takes an epoch's gradient, Adam's step and its predictions, as in `fit`."""
  import jax
  import jax.numpy as jnp
  import optax

  from moe_jax.graphs import fit, networks

  settings, x = fit.Settings(), jnp.asarray(data.features)
  given = (operator, x, jnp.asarray(data.labels), jnp.asarray(train), weights)
  sizes = networks.Sizes(settings.hidden, data.num_classes, settings.dropout)
  module = networks.GCN(sizes)
  params = module.init(jax.random.key(0), operator, x, train=False)
  adam = optax.adam(fit.OFFICIAL.learning_rate)
  state = adam.init(params)

  @jax.jit
  def step(params: Any, state: Any, given: tuple[Any, ...]) -> Any:
    operator, x, labels, train, weights = given

    def loss(params: Any) -> jax.Array:
      key = {'dropout': jax.random.key(1)}
      logits: Any = module.apply(params, operator, x, train=True, rngs=key)
      return fit.loss_of_labelled(logits, labels, train, weights, settings.loss)

    updates, new_state = adam.update(jax.grad(loss)(params), state)
    params = optax.apply_updates(params, updates)
    logits: Any = module.apply(params, operator, x, train=False)
    return params, new_state, logits.argmax(-1)

  return lambda: jax.block_until_ready(step(params, state, given))


def line(row: Mapping[str, float]) -> str:
  """A graph's seconds in a line, with the ratios to the dense ways where these were measured."""
  parts = [f'{row["nodes"]:,} nodes, {row["edges"]:,} edges']
  for name, dense in ((SPARSE, DENSE), (POWER, EXACT), (PUSH, EXACT)):
    text = f'{name} {1000 * row[name]:.1f} ms'
    if dense in row:
      text += f' (dense {1000 * row[dense]:.1f} ms, {row[dense] / row[name]:.1f} times)'
    parts.append(text)
  return '; '.join(parts)


def draw(rows: Sequence[Mapping[str, float]], path: pathlib.Path):
  """Draws seconds against nodes."""
  import matplotlib.figure
  from matplotlib.backends import backend_agg

  figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots()
  for i, name in enumerate((SPARSE, DENSE, POWER, PUSH, EXACT)):
    at = [row for row in rows if name in row]
    style = '--' if name in (DENSE, EXACT) else '-'
    axes.plot([r['nodes'] for r in at], [r[name] for r in at], f'o{style}', color=f'C{i}', ms=4,
              label=name)  # fmt: skip
  axes.set(xscale='log', yscale='log', xlabel='nodes', ylabel='seconds, best of the repeats')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})


if __name__ == '__main__':
  cli.run(main, define_flags)
