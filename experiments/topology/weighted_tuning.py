"""The runs of `experiments.topology.bridge`: graph, weights, tuning, and the table."""

import collections
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from experiments.common import package_functions, readme_tables, study_record
from moe_jax import atomic_files
from moe_jax.analysis import paired
from moe_jax.api import load
from moe_jax.api import run as run_lib
from moe_jax.api import train as train_lib
from moe_jax.config import schema
from moe_jax.data import conversations
from moe_jax.graphs import dataset, nearest_neighbors, pagerank, resampling, structs, totoro
from moe_jax.interop import start_weights
from moe_jax.post_training import answers
from moe_jax.runs import train_run

ARMS = ('uniform', 'renode', 'renode_within')
START, END = '<!-- bridge: written by the command -->', '<!-- end of bridge -->'
_COPIES = 4  # of a labelled function in the training file, on average
_ANSWER_TOKENS = 12


def labelled(classes: np.ndarray, per_class: int, seed: int) -> np.ndarray:
  """[nodes] bool: `per_class` nodes of every class, drawn by the seed."""
  rng, found = np.random.default_rng(seed), np.zeros(len(classes), bool)
  for one in np.unique(classes):
    found[rng.choice(np.flatnonzero(classes == one), per_class, replace=False)] = True
  return found


def weights_of(
  graph: structs.Graph, classes: np.ndarray, train: np.ndarray, arm: str
) -> np.ndarray:
  """[nodes] float32 weights of the labelled nodes, 0 for the others.

  Args:
    graph: of all nodes.
    classes: [nodes] classes; only those of labelled nodes are looked at.
    train: [nodes] bool, the labelled ones.
    arm: one of `ARMS`.
  """
  if arm == 'uniform':
    return train.astype(np.float32)
  adjacency, num_classes = structs.normalized(graph), int(classes.max()) + 1
  shared = jnp.asarray(classes), jnp.asarray(train)
  met = totoro.of_nodes(lambda x: pagerank.apply(adjacency, x), *shared, num_classes)
  if arm == 'renode':
    return np.asarray(totoro.weights(met, shared[1]))
  return np.asarray(totoro.weights_within_classes(met, *shared, num_classes))


def run_study(base_dir: str, workdir: pathlib.Path, seeds: Sequence[int], out: pathlib.Path):
  """Tunes and measures every arm with every seed, and writes the table.

  Raises:
    errors.InputError: the base cannot be read, or a run in `workdir` is of other settings.
  """
  values = flags.FLAGS
  readme_tables.check(out, START, END)
  base = load.load(base_dir, flag='--base')
  found = package_functions.read(per_package=values.per_package)
  classes = np.array([one.package for one in found])
  questions = [package_functions.question(one) for one in found]
  vectors = dataset.unit_rows(base.embed([one.text for one in found]))
  graph = nearest_neighbors.graph(vectors, values.neighbors)
  same = classes[graph.senders] == classes[graph.receivers]
  settings = {name: values[name].value for name in ('steps', 'labels', 'per_package', 'neighbors')}
  settings |= {'functions': len(found), 'edges': graph.num_edges // 2}
  settings |= {
    'homophily': round(float(same.mean()), 4),
    'packages': list(package_functions.PACKAGES),
  }
  results: dict[str, dict[str, Any]] = {}
  with atomic_files.lock(workdir):
    keys = [(seed, arm) for seed in seeds for arm in ARMS]
    for seed, arm in tqdm.tqdm(keys, desc='runs', unit='run'):
      path = workdir / f'{arm}-{seed}' / 'result.json'
      if not path.exists():
        train = labelled(classes, values.labels, seed)
        weights = weights_of(graph, classes, train, arm)
        result = _tune(base_dir, questions, classes, train, weights, seed, path.parent)
        atomic_files.write_text(path, json.dumps(result | {'settings': settings}) + '\n')
        jax.clear_caches()
      results[f'{arm}/{seed}'] = _read(path, settings)
  _write(out, seeds, results, settings)


def _read(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
  result = json.loads(path.read_text(encoding='utf-8'))
  study_record.require_same(path, result.pop('settings'), settings)
  return result


def _tune(
  base_dir: str,
  questions: Sequence[str],
  classes: np.ndarray,
  train: np.ndarray,
  weights: np.ndarray,
  seed: int,
  place: pathlib.Path,
) -> dict[str, Any]:
  """Tunes one run on copies in proportion to `weights`, and asks it about all other functions."""
  copies = resampling.copies(weights, _COPIES * int(train.sum()), seed)
  lines = [
    json.dumps({'prompt': questions[i], 'completion': package_functions.PACKAGES[classes[i]]})
    for i in np.repeat(np.arange(len(copies)), copies)
  ]
  place.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(place / 'train.jsonl', '\n'.join(lines) + '\n')
  cfg = _config(base_dir, place, seed)
  tuned, _ = train_run.run_training(
    cfg, place, argv=sys.argv, say=lambda line: None, open_weights=start_weights.of
  )
  if tuned.interrupted_by:
    raise KeyboardInterrupt
  run = run_lib.Run(tuned, place)
  rest = np.flatnonzero(~train)
  asked = [
    answers.Question(
      conversations.from_messages([{'role': 'user', 'content': questions[i]}], for_prompt=True),
      package_functions.PACKAGES[classes[i]],
    )
    for i in rest
  ]
  told: list[str] = []

  def keep(question: answers.Question, text: str, right: bool):
    del question, right
    told.append(text)

  count = answers.measure(run, asked, cfg.data, _ANSWER_TOKENS, keep)
  return {
    'accuracy': count.right / count.total,
    'macro_f1': macro_f1(classes[rest], told),
    'heldout': count.total,
    'class_weights': [
      round(float(weights[(classes == one) & train].mean()), 3) for one in np.unique(classes)
    ],
  }


def macro_f1(classes: np.ndarray, told: Sequence[str]) -> float:
  """Mean over packages of the F1 of answers; an answer that names no package is of none."""
  numbers = {name: i for i, name in enumerate(package_functions.PACKAGES)}
  said = np.array([numbers.get(one.strip(), -1) for one in told])
  scores = []
  for one in np.unique(classes):
    both = int(((said == one) & (classes == one)).sum())
    scores.append(2 * both / max(int((said == one).sum() + (classes == one).sum()), 1))
  return statistics.fmean(scores)


def _config(base_dir: str, place: pathlib.Path, seed: int) -> schema.Config:
  return train_lib.resolve(
    'sft',
    {
      'init_from': base_dir,
      'data.source': 'conversations',
      'data.path': str(place / 'train.jsonl'),
      'data.heldout_fraction': 0.02,
      'optim.warmup_steps': min(20, flags.FLAGS.steps // 5),
      'train.seed': seed,
      'train.num_steps': flags.FLAGS.steps,
      'train.eval_every': 0,
      'train.sample_prompt': '',
      'checkpoint.save_every': flags.FLAGS.steps,
    },
  )


def _write(
  out: pathlib.Path,
  seeds: Sequence[int],
  results: Mapping[str, Mapping[str, Any]],
  settings: Mapping[str, Any],
):
  out.mkdir(parents=True, exist_ok=True)
  record = {'settings': dict(settings), 'seeds': list(seeds), 'runs': dict(results)}
  atomic_files.write_text(out / 'bridge.json', json.dumps(record, indent=1) + '\n')
  text = table(seeds, results)
  print(text)
  readme_tables.fill(out, START, END, text)


def table(seeds: Sequence[int], results: Mapping[str, Mapping[str, Any]]) -> str:
  """Markdown: means over seeds, and differences to equal weights, seed by seed."""
  of = collections.defaultdict(dict)
  for arm in ARMS:
    for key in ('accuracy', 'macro_f1'):
      of[arm][key] = [100 * results[f'{arm}/{seed}'][key] for seed in seeds]
  rows = [
    '| arm | right, % | against uniform, points | macro F1, % | against uniform, points | mean '
    'weight of a package, least and most |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  for arm in ARMS:
    shares = np.array([results[f'{arm}/{seed}']['class_weights'] for seed in seeds]).mean(axis=0)
    cells = []
    for key in ('accuracy', 'macro_f1'):
      against = paired.difference(of[arm][key], of[ARMS[0]][key]).text(1)
      cells += [f'{statistics.fmean(of[arm][key]):.1f}', '' if arm == ARMS[0] else against]
    rows.append(f'| {arm} | {" | ".join(cells)} | {shares.min():.2f}, {shares.max():.2f} |')
  return '\n'.join(rows)
