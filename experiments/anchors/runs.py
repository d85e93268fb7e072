"""The study's runs: each trained, and measured on episodes as in training and on harder ones."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import anchors
from experiments.anchors import pictures, report, tables
from experiments.common import cli, local_jobs, readme_tables, study_record
from moe_jax import atomic_files, errors
from moe_jax.analysis.anchors import measure, tasks
from moe_jax.api import train as train_lib
from moe_jax.config import pages
from moe_jax.data.tasks import episodes
from moe_jax.runs import trained_run

START, END = '<!-- table: written by the command -->', '<!-- end of table -->'
PICTURES = ('flow', 'blocking', 'correlation', 'compression', 'experts')
Key = tables.Key


def main(unused_argv: Sequence[str]):
  """Trains, measures, writes."""
  values, workdir = flags.FLAGS, pathlib.Path(cli.required('workdir'))
  readme_tables.check(pathlib.Path(values.out), START, END)
  seeds, variants = local_jobs.seeds(values.seeds), _variants(values.variants)
  episodes.changed(episodes.Task(), f'?noise={values.noise}', '--noise')  # before any training
  for name, least in (('steps', 0), ('sets', 2), ('queries', 1)):
    given = values[name].value
    errors.require(given >= least, f'--{name}={given} must be at least {least}')
  keys = [(variant, seed) for seed in seeds for variant in variants]
  for key in keys:
    _check(workdir, key)
  pending = [key for key in keys if not all(path.exists() for path in _paths(workdir, key))]
  local_jobs.run('experiments.anchors.study', pending, lambda key: _one(workdir, key))
  if local_jobs.is_shard():
    return
  write(pathlib.Path(values.out), variants, seeds, {key: _read(workdir, key) for key in keys})


def _variants(names: Sequence[str]) -> list[str]:
  for name in names:
    errors.require(
      name in anchors.VARIANTS,
      f'--variants={name} must be among {", ".join(anchors.VARIANTS)}'
      f'{errors.did_you_mean(name, anchors.VARIANTS)}',
    )
  return list(names)


def _paths(workdir: pathlib.Path, key: Key) -> tuple[pathlib.Path, pathlib.Path]:
  """The record of a run, and that on harder episodes."""
  directory = workdir / key[0] / str(key[1])
  return directory / 'anchors.json', directory / f'noise_{flags.FLAGS.noise}' / 'anchors.json'


def _check(workdir: pathlib.Path, key: Key):
  """Requires that what was trained and measured before is what is asked for now.

  Raises:
    errors.InputError: it is of other steps, sets or queries.
  """
  values = flags.FLAGS
  steps = values.steps or pages.values('episodes:marked').train.num_steps
  now = {'sets': values.sets, 'queries': values.queries, 'steps': steps}
  for path in filter(pathlib.Path.exists, _paths(workdir, key)):
    record = json.loads(path.read_text(encoding='utf-8'))
    was = {name: record['settings'][name] for name in ('sets', 'queries')}
    was['steps'] = record['step']
    study_record.require_same(path, was, now)


def _read(workdir: pathlib.Path, key: Key) -> tables.Record:
  record, harder = (json.loads(path.read_text()) for path in _paths(workdir, key))
  return record | {'harder': harder}


def _one(workdir: pathlib.Path, key: Key):
  """Trains one run and measures it twice, with figures; goes on from what is there."""
  path, harder = _paths(workdir, key)
  if not path.exists():  # what was measured was trained
    _stages(path.parent, *key)
  run = trained_run.load(path.parent)
  _measure(run, 'episodes', [p for p in measure.PARTS if p not in tables.HARDER_PARTS], path)
  _measure(run, f'episodes?noise={flags.FLAGS.noise}', tables.HARDER_PARTS, harder)
  jax.clear_caches()


def _stages(workdir: pathlib.Path, variant: str, seed: int):
  """Trains the three stages of the page."""
  first, between = workdir / 'pairs', workdir / 'repeated'
  _train('episodes' if variant == 'fine' else f'episodes:{variant}', first, seed)
  _train('episodes:repeated', between, seed, init_from=str(first))
  _train('episodes:marked', workdir, seed, init_from=str(between))


def _train(page: str, workdir: pathlib.Path, seed: int, **changes: Any):
  """Trains one stage; one that is complete is only read."""
  changes['train.seed'] = seed
  if steps := flags.FLAGS.steps:
    changes |= {'train.num_steps': steps, 'checkpoint.save_every': steps}
  run = train_lib.train(page, workdir, report=False, say=lambda line: None, **changes)
  if run.interrupted_by:
    raise KeyboardInterrupt


def _measure(run: trained_run.Run, name: str, parts: Sequence[str], path: pathlib.Path):
  """Measures a run on one task and writes the record with its report; one that is there stays."""
  if path.exists():
    return
  task = tasks.of(name, '', episodes.of_path(run.cfg.data.path, 'config.data.path'))
  subject = measure.Subject(run.cfg.model, run.variables, run.tokenizer)
  settings = measure.Settings(flags.FLAGS.sets, flags.FLAGS.queries)
  record = {'step': run.step, 'task': task.name, 'settings': settings._asdict()}
  record |= measure.run(measure.prepare(subject, task, settings), parts)
  path.parent.mkdir(exist_ok=True)
  report.write(record, path.parent)
  atomic_files.write_text(path, json.dumps(record) + '\n')
  print(f'{path}: accuracy {np.mean(record["accuracy"]):.3f}', flush=True)


def write(
  out: pathlib.Path,
  variants: Sequence[str],
  seeds: Sequence[int],
  found: Mapping[Key, tables.Record],
):
  """Writes results.json, the figures, and the tables into README.md."""
  out.mkdir(parents=True, exist_ok=True)
  settings = {name: flags.FLAGS[name].value for name in ('steps', 'sets', 'queries', 'noise')}
  record = {
    'settings': settings,
    'seeds': list(seeds),
    'runs': {f'{variant}/{seed}': tables.compact(one) for (variant, seed), one in found.items()},
  }
  atomic_files.write_text(out / 'results.json', json.dumps(_rounded(record), indent=1) + '\n')
  own = {v: tables.who_learned(one) for v, one in tables.by_variant(variants, found).items()}
  own = {v: records for v, records in own.items() if records}
  together = {v: tables.merged(records) for v, records in own.items()}
  pictures.draw_side_by_side(together, PICTURES, out)
  harder = {v: tables.merged_harder(records) for v, records in own.items()}
  pictures.draw_side_by_side(harder, ('reweighting',), out)
  text = tables.write(variants, found)
  readme_tables.fill(out, START, END, text)
  print(text)


def _rounded(value: Any) -> Any:
  """With four places; NaN, which JSON has not, as None."""
  if isinstance(value, Mapping):
    return {key: _rounded(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(one) for one in value]
  if isinstance(value, float):
    return round(value, 4) if math.isfinite(value) else None
  return value
