"""Does ReNode help, on which graphs and networks, and does Totoro foretell how well it goes?

python -m experiments.topology.study --workdir=runs/topology [--splits=20] [--seeds=1]
  [--graphs=scipy,sbm-0.8,sbm-0.4,digits] [--models=gcn,gat,ppnp,appnp,sage,cheb,sgc]
  [--minutes=20] [--out=experiments/topology]

Every unit is a graph, a network and a rate of Adam, trained with and without ReNode on the same
splits from the same starts; then, with ten times the labels in half of the classes, GCN under four
losses, and GCN with ranks within classes. A unit is a file of --workdir: a command given again does
what is left. Table, figure and results.json go to --out.
"""

import functools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.common import cli, local_jobs, readme_tables
from moe_jax import atomic_files, errors

START, END = '<!-- table: written by the command -->', '<!-- end of table -->'
MODELS = ('gcn', 'gat', 'ppnp', 'appnp', 'sage', 'cheb', 'sgc')


class Graph(NamedTuple):
  """A graph and how much of it is labelled."""

  spec: str
  mixing: float = 0.7
  per_class: int = 20
  valid_per_class: int = 30


GRAPHS = {
  'scipy': Graph('imports:scipy', 0, 10, 10),
  'sbm-0.8': Graph('sbm:1000', 0.8),
  'sbm-0.4': Graph('sbm:1000', 0.4),
  'digits': Graph('digits'),
}
DECAYS = {'constant': 1.0, 'official': 0.95}
UNEVEN_GRAPHS = ('sbm-0.8', 'digits')
UNEVEN_LOSSES = ('cross_entropy', 're_weight', 'class_balanced', 'focal')
WITHIN_GRAPHS = ('digits', 'scipy')  # where ranks within classes are tried, too
UNEVEN, LABEL_SHARE = 10.0, 0.1


class Key(NamedTuple):
  """A unit of the study."""

  graph: str
  model: str
  rate: str
  loss: str = 'cross_entropy'
  imbalance: float = 1.0
  ranks: str = 'all'

  @property
  def file(self) -> str:
    """Name of its file."""
    ranks = '' if self.ranks == 'all' else f'.{self.ranks}'
    return f'{self.graph}.{self.model}.{self.rate}.{self.loss}.{self.imbalance:g}{ranks}.json'


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds a file per unit')
  flags.DEFINE_list('graphs', list(GRAPHS), 'graphs')
  flags.DEFINE_list('models', list(MODELS), 'networks')
  flags.DEFINE_list('splits', ['20'], 'seeds of splits, or how many')
  flags.DEFINE_list('seeds', ['1'], 'seeds of starts, or how many')
  flags.DEFINE_float('minutes', 0, 'begin no unit after so many, 0 for no limit')
  cli.path_flag('out', 'experiments/topology', 'directory of README.md, results.json, gains.png')


def keys(graphs: Sequence[str], models: Sequence[str]) -> Iterator[Key]:
  """The units, those that decide most first.

  Raises:
    errors.InputError: there is no such graph or network.
  """
  for flag, given, known in (('graphs', graphs, GRAPHS), ('models', models, MODELS)):
    for one in given:
      hint = errors.did_you_mean(one, known)
      errors.require(one in known, f'--{flag}={one} must be among {", ".join(known)}{hint}')
  first = [model for model in models if model == 'gcn']
  others = [model for model in models if model != 'gcn']
  for rate in DECAYS:
    yield from (Key(graph, model, rate) for graph in graphs for model in first)
  for graph in UNEVEN_GRAPHS:
    if graph in graphs:
      for model in first:
        yield from (Key(graph, model, 'constant', loss, UNEVEN) for loss in UNEVEN_LOSSES)
  for graph in WITHIN_GRAPHS:
    if graph in graphs and first:
      yield from (Key(graph, 'gcn', rate, ranks='class') for rate in DECAYS)
  for rate in DECAYS:
    yield from (Key(graph, model, rate) for graph in graphs for model in others)


def main(argv: Sequence[str]):
  """Trains what is left, and writes."""
  del argv
  from experiments.topology import report

  values = flags.FLAGS
  workdir, out = pathlib.Path(cli.required('workdir')), pathlib.Path(values.out)
  readme_tables.check(out, START, END)
  splits, seeds = local_jobs.seeds(values.splits), local_jobs.seeds(values.seeds)
  errors.require(len(splits) >= 5, f'--splits={len(splits)} must be at least 5, for intervals')
  asked, end = list(keys(values.graphs, values.models)), time.monotonic() + 60 * values.minutes
  with atomic_files.lock(workdir):
    for key in asked:
      path = workdir / key.file
      if path.exists():
        _check(path, splits, seeds)
        continue
      if values.minutes and time.monotonic() > end:
        break
      unit = train_unit(key, splits, seeds)
      atomic_files.write_text(path, json.dumps(unit) + '\n')
      print(f'{report.name(unit["key"])}: {report.gain(unit).text(1)} points', flush=True)
  _write(workdir, asked, out)


def _check(path: pathlib.Path, splits: Sequence[int], seeds: Sequence[int]):
  """Requires that a unit's file is of the splits and starts that are asked for."""
  unit = json.loads(path.read_text(encoding='utf-8'))
  errors.require(
    (unit['splits'], unit['seeds']) == (list(splits), list(seeds)),
    f'{path} is of {len(unit["splits"])} splits and {len(unit["seeds"])} starts; give the same '
    '--splits and --seeds, or another --workdir',
  )


@functools.cache
def _data(graph: str) -> Any:
  from moe_jax.graphs import named

  given = GRAPHS[graph]
  return named.read(given.spec, mixing=given.mixing)


@functools.cache
def _prepared(graph: str, model: str) -> Any:
  import jax.numpy as jnp

  from moe_jax.graphs import networks

  data = _data(graph)
  return networks.NETWORKS[model].prepare(data.graph, jnp.asarray(data.features))


@functools.cache
def _split(graph: str, imbalance: float, seeds: tuple[int, ...]) -> Any:
  """(masks, T [splits, nodes]) of the splits."""
  from experiments.topology import trials

  data, given = _data(graph), GRAPHS[graph]
  labels = trials.Labels(given.per_class, given.valid_per_class, imbalance, LABEL_SHARE)
  chosen = trials.split(data, labels, seeds)
  return chosen, trials.totoros(data, chosen.train, trials.Weighting())


def train_unit(key: Key, splits: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
  """Trains both arms of a unit; returns its record for JSON."""
  import numpy as np

  from experiments.topology import trials
  from moe_jax.graphs import dataset, fit, totoro

  data = _data(key.graph)
  chosen, found = _split(key.graph, key.imbalance, tuple(splits))
  renode = trials.renode(data, found, chosen.train, trials.Weighting(ranks=key.ranks))
  arms = {
    arm: trials.train(
      data, key.model, chosen, weights, seeds, fit.Settings(loss=key.loss),
      fit.Schedule(decay=DECAYS[key.rate]), prepared=_prepared(key.graph, key.model),
    )
    for arm, weights in (('plain', np.ones_like(renode)), ('renode', renode))
  }  # fmt: skip
  members = np.eye(data.num_classes)[data.labels] * chosen.train[..., None]
  by_class = np.einsum('snc,sn->sc', members, renode) / members.sum(1)
  return {
    'key': key._asdict(),
    'splits': list(splits),
    'seeds': list(seeds),
    'nodes': data.graph.num_nodes,
    'edges': data.graph.num_edges // 2,
    'homophily': round(dataset.homophily(data), 4),
    'totoro': np.asarray(totoro.of_graph(found, chosen.train), float).round(5).tolist(),
    'class_weights': by_class.mean(0).round(3).tolist(),
    'arms': arms,
  }


def _write(workdir: pathlib.Path, asked: Sequence[Key], out: pathlib.Path):
  """Writes results.json, the figure, and the table in README.md, of the units that are there."""
  from experiments.topology import report

  done = [key for key in asked if (workdir / key.file).exists()]
  errors.require(bool(done), f'{workdir} has no unit yet; give more --minutes')
  units = [json.loads((workdir / key.file).read_text(encoding='utf-8')) for key in done]
  units.sort(key=lambda unit: [unit['key'][part] for part in ('imbalance', 'graph', 'rate')])
  out.mkdir(parents=True, exist_ok=True)
  text = report.study_table(units)
  lines = ',\n'.join(json.dumps(unit) for unit in units)
  atomic_files.write_text(out / 'results.json', f'[\n{lines}\n]\n')
  report.draw(units, out / 'gains.png')
  readme_tables.fill(out, START, END, text)
  print(text)
  if len(done) < len(asked):
    print(f'{len(asked) - len(done)} of {len(asked)} units are left; the same command goes on')


if __name__ == '__main__':
  cli.run(main, define_flags)
