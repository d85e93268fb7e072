"""Node classification on a graph whose labelled nodes lie unevenly, without and with ReNode.

python -m experiments.topology --graph=digits --model=gcn --renode [--splits=5] [--seeds=3]
  [--imbalance=10 --label_share=0.1 --loss=re_weight] [--decay=1] [--out=FILE.json]

Graphs: sbm:NODES (classes that meet at planted borders), digits (images of scikit-learn and their
nearest), imports:PACKAGE+PACKAGE... (modules of installed packages), and cora, citeseer, pubmed
from Planetoid's files in --data_dir. With --renode both arms are trained, on the same splits from
the same starts, and the paired differences are shown.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs
from moe_jax import errors

# As in moe_jax/graphs, which help must not import.
MODELS = ('gcn', 'gat', 'ppnp', 'appnp', 'sage', 'cheb', 'sgc', 'pprgo')
LOSSES = ('cross_entropy', 're_weight', 'focal', 'class_balanced')


def define_flags():
  """Defines the command's flags."""
  flags.DEFINE_string('graph', 'sbm:1000', 'graph and classes of its nodes')
  cli.path_flag('data_dir', '', "directory of Planetoid's files ind.NAME.*")
  flags.DEFINE_float('mixing', 0.7, 'share of edges that leave the class at a border of sbm')
  flags.DEFINE_integer('least', 40, 'modules of a class of imports, at least')
  flags.DEFINE_integer('graph_seed', 0, 'of sbm')
  flags.DEFINE_enum('model', 'gcn', MODELS, 'network')
  flags.DEFINE_bool('renode', False, "train with ReNode's weights too")
  flags.DEFINE_float('w_min', 0.5, "smallest of ReNode's weights")
  flags.DEFINE_float('w_max', 1.5, "largest of ReNode's weights")
  flags.DEFINE_enum('ranks', 'all', ('all', 'class'), 'among which nodes a Totoro is ranked')
  flags.DEFINE_float('restart', 0.15, 'probability that PageRank starts again')
  flags.DEFINE_enum('loss', 'cross_entropy', LOSSES, 'loss of a labelled node')
  flags.DEFINE_integer('train_per_class', 20, 'labelled nodes per class')
  flags.DEFINE_integer('valid_per_class', 30, 'validation nodes per class')
  flags.DEFINE_float('imbalance', 1.0, 'labels of head classes over those of the others')
  flags.DEFINE_float('label_share', 0.01, 'share of nodes with labels, with --imbalance')
  flags.DEFINE_list('splits', ['5'], 'seeds of splits, or how many')
  flags.DEFINE_list('seeds', ['3'], 'seeds of starts, or how many')
  flags.DEFINE_integer('hidden', 32, 'width')
  flags.DEFINE_integer('epochs', 200, 'epochs at most')
  flags.DEFINE_float('learning_rate', 0.0075, "Adam's rate")
  flags.DEFINE_float('decay', 0.95, 'of the rate per epoch after the 20th; 1 for a constant rate')
  flags.DEFINE_integer('together', 1, 'runs that one compiled step trains side by side')
  cli.path_flag('out', '', 'file for the figures, as JSON')


def main(argv: Sequence[str]):
  """Trains and prints."""
  del argv
  import numpy as np

  from experiments.topology import report, trials
  from moe_jax import atomic_files
  from moe_jax.graphs import class_losses, dataset, fit, named, pprgo, totoro

  assert MODELS == trials.MODELS and LOSSES == class_losses.LOSSES
  v = flags.FLAGS
  if v.imbalance == 1:
    cli.refuse_idle(('label_share',), 'without --imbalance')
  data = named.read(v.graph, v.graph_seed, v.data_dir, v.mixing, v.least)
  print(
    f'{data.name}: {data.graph.num_nodes} nodes, {data.graph.num_edges // 2} edges, '
    f'{data.num_classes} classes, {dataset.homophily(data):.3f} of edges within a class'
  )
  errors.require(
    v.ranks == 'all' or v.model != trials.PPRGO, '--ranks=class is not built for --model=pprgo'
  )
  errors.require(v.imbalance >= 1, f'--imbalance={v.imbalance} must be at least 1')
  labels = trials.Labels(v.train_per_class, v.valid_per_class, v.imbalance, v.label_share)
  chosen = trials.split(data, labels, local_jobs.seeds(v.splits))
  weighting = trials.Weighting(v.w_min, v.w_max, v.restart, ranks=v.ranks)
  found = trials.totoros(data, chosen.train, weighting)
  graph_totoro = np.asarray(totoro.of_graph(found, chosen.train), float).tolist()
  seeds = local_jobs.seeds(v.seeds)
  arms = {}
  for arm in ('plain', 'renode') if v.renode else ('plain',):
    if v.model == trials.PPRGO:
      settings = pprgo.Settings(
        hidden=v.hidden, epochs=v.epochs, learning_rate=v.learning_rate, restart=v.restart,
        loss=v.loss,
      )  # fmt: skip
      renode = (v.w_min, v.w_max) if arm == 'renode' else None
      arms[arm] = trials.train_pprgo(data, chosen, renode, seeds, settings)
      continue
    weights = np.ones_like(chosen.train, np.float32)
    if arm == 'renode':
      weights = trials.renode(data, found, chosen.train, weighting)
    arms[arm] = trials.train(
      data, v.model, chosen, weights, seeds,
      fit.Settings(hidden=v.hidden, epochs=v.epochs, loss=v.loss),
      fit.Schedule(v.learning_rate, v.decay), v.together,
    )  # fmt: skip
  print(report.arms_table(arms))
  if len(graph_totoro) > 3:
    r = report.correlation(graph_totoro, arms['plain']['weighted_f1'])
    print(f'correlation of Totoro and weighted F1 over splits: {r}')
  if v.out:
    record = {'graph': data.name, 'totoro': graph_totoro, 'arms': arms}
    atomic_files.write_text(pathlib.Path(v.out), json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  cli.run(main, define_flags)
