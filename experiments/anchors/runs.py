"""The study's runs: each trained and measured once, and what they say together."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.anchors import claims, pictures, report
from experiments.common import cli, local_jobs, readme_tables
from moe_jax import atomic_files, errors
from moe_jax.analysis import paired
from moe_jax.analysis.anchors import measure, tasks
from moe_jax.api import train as train_lib
from moe_jax.data.tasks import episodes
from moe_jax.runs import trained_run

START, END = '<!-- table: written by the command -->', '<!-- end of table -->'
Key = tuple[str, int]  # variant, seed


def main(unused_argv: Sequence[str]):
  """Trains, measures, writes."""
  values, workdir = flags.FLAGS, pathlib.Path(cli.required('workdir'))
  seeds, variants = local_jobs.seeds(values.seeds), _variants(values.variants)
  keys = [(variant, seed) for seed in seeds for variant in variants]
  pending = [key for key in keys if not _path(workdir, key).exists()]
  local_jobs.run('experiments.anchors.study', pending, lambda key: _one(workdir, key))
  if local_jobs.is_shard():
    return
  found = {key: json.loads(_path(workdir, key).read_text()) for key in keys}
  write(pathlib.Path(values.out), variants, seeds, found)


def _variants(names: Sequence[str]) -> list[str]:
  known = ('dense', 'gshard', 'fine')
  for name in names:
    errors.require(
      name in known,
      f'--variants={name} must be among {", ".join(known)}{errors.did_you_mean(name, known)}',
    )
  return list(names)


def _path(workdir: pathlib.Path, key: Key) -> pathlib.Path:
  return workdir / key[0] / str(key[1]) / 'anchors.json'


def _one(workdir: pathlib.Path, key: Key):
  """Trains one run, measures it, and writes its figures."""
  variant, seed = key
  values, path = flags.FLAGS, _path(workdir, key)
  first = path.parent / 'pairs'
  _train('episodes' if variant == 'fine' else f'episodes:{variant}', first, seed)
  _train('episodes:marked', path.parent, seed, init_from=str(first))
  run = trained_run.load(path.parent)
  trained = episodes.of_path(run.cfg.data.path, 'config.data.path')
  task = tasks.of('episodes', '', trained)
  subject = measure.Subject(run.cfg.model, run.variables, run.tokenizer)
  settings = measure.Settings(values.sets, values.queries)
  record = {'step': run.step, 'task': task.name, 'settings': settings._asdict()}
  record |= measure.run(measure.prepare(subject, task, settings))
  report.write(record, path.parent)
  atomic_files.write_text(path, json.dumps(record) + '\n')
  print(f'{path}: accuracy {np.mean(record["accuracy"]):.3f}', flush=True)
  jax.clear_caches()


def _train(page: str, workdir: pathlib.Path, seed: int, **changes: Any):
  """Trains one stage; one that is complete is only read."""
  changes['train.seed'] = seed
  if steps := flags.FLAGS.steps:
    changes |= {'train.num_steps': steps, 'checkpoint.save_every': steps}
  run = train_lib.train(page, workdir, report=False, say=lambda line: None, **changes)
  if run.interrupted_by:
    raise KeyboardInterrupt


def by_seed(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
  """Every claim's difference, a mean per run."""
  found = [claims.differences(record) for record in records]
  return {text: [float(np.mean(one[text])) for one in found] for text in found[0]}


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """One record of several seeds, whose units are the runs' means: what the figures show."""

  def over_units(values: Sequence[Any]) -> list[Any]:
    return [np.mean(value, axis=0).tolist() for value in values]

  first = records[0]
  out: dict[str, Any] = {
    'accuracy': over_units([r['accuracy'] for r in records]),
  }
  shares = {k: [r['flow']['abs_of_sum'][k] for r in records] for k in ('wp', 'pq', 'ww')}
  out['flow'] = {'abs_of_sum': {k: over_units(v) for k, v in shares.items()}}
  out['blocking'] = {
    arm: {'label_loyalty': over_units([r['blocking'][arm]['label_loyalty'] for r in records])}
    for arm in first['blocking']
  }
  auc = np.asarray([r['correlation']['auc'] for r in records])
  intervals = [paired.interval(column.tolist()) for column in auc.T]
  finite = auc.shape[0] > 1
  out['correlation'] = {
    'auc': auc.mean(axis=0).tolist(),
    'low': [i.low if finite else i.mean for i in intervals],
    'high': [i.high if finite else i.mean for i in intervals],
    'cumulative': np.mean([r['correlation']['cumulative'] for r in records], axis=0).tolist(),
  }
  out['reweighting'] = {
    key: {'accuracy': over_units([r['reweighting'][key]['accuracy'] for r in records])}
    | ({'shots': first['reweighting'][key]['shots']} if key == 'more_shots' else {})
    for key in first['reweighting']
  }
  arms = {
    arm: {
      key: over_units([r['compression']['arms'][arm][key] for r in records])
      for key in ('label_loyalty', 'word_loyalty', 'accuracy')
    }
    for arm in first['compression']['arms']
  }
  out['compression'] = {'arms': arms}
  if 'experts' in first:
    out['experts'] = {
      key: np.mean([r['experts'][key] for r in records], axis=0).tolist()
      for key in ('separation_text', 'separation_format')
    }
  return out


def table(variants: Sequence[str], found: Mapping[Key, Mapping[str, Any]]) -> str:
  """A Markdown table: a claim per row, a variant per column, intervals over seeds."""
  records = {v: [r for (name, _), r in found.items() if name == v] for v in variants}
  columns = {v: by_seed(own) for v, own in records.items()}
  accuracy = {
    v: paired.interval([float(np.mean(r['accuracy'])) for r in own]).text(3, sign=False)
    for v, own in records.items()
  }
  rows = [
    f'| above 0 as the paper has it | {" | ".join(variants)} |',
    '| --- |' + ' --- |' * len(variants),
    f'| *accuracy, one shot per class* | {" | ".join(accuracy.values())} |',
  ]
  # A single run has no interval over seeds: its own, over sets, has to do.
  learned = {
    v: all(claims.learns(r['accuracy'], r['chance']) for r in own) for v, own in records.items()
  }
  texts = dict.fromkeys(text for own in columns.values() for text in own)
  for text in texts:
    cells = []
    for variant, own in columns.items():
      if text not in own:
        cells.append('-')
        continue
      interval = paired.interval(own[text])
      cells.append(f'{interval.text(3)} {claims.verdict(interval, learned[variant])}')
    rows.append(f'| {text} | {" | ".join(cells)} |')
  return '\n'.join(rows)


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
  """Of one run what the table and the figures are made of, without its units."""
  return merged([record]) | {
    'chance': record['chance'],
    'differences': by_seed([record]),
    'seconds': record['compression']['seconds'],
    'kept_share': record['compression']['kept_share'],
    'confusion': report.rank_correlation(record),
    'experts_silenced': {
      arm: float(np.mean(own['label_loyalty']))
      for arm, own in record.get('experts', {}).get('arms', {}).items()
    },
  }


def write(
  out: pathlib.Path,
  variants: Sequence[str],
  seeds: Sequence[int],
  found: Mapping[Key, Mapping[str, Any]],
):
  """Writes results.json, the figures, and the table into README.md."""
  out.mkdir(parents=True, exist_ok=True)
  record = {
    'settings': {name: flags.FLAGS[name].value for name in ('steps', 'sets', 'queries')},
    'seeds': list(seeds),
    'runs': {f'{variant}/{seed}': compact(one) for (variant, seed), one in found.items()},
  }
  atomic_files.write_text(out / 'results.json', json.dumps(_rounded(record), indent=1) + '\n')
  together = {v: merged([r for (name, _), r in found.items() if name == v]) for v in variants}
  parts = ('flow', 'blocking', 'correlation', 'compression', 'experts')
  pictures.draw_side_by_side(together, parts, out)
  text = table(variants, found)
  readme_tables.fill(out, START, END, text)
  print(text)


def _rounded(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _rounded(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(one) for one in value]
  return round(value, 4) if isinstance(value, float) else value
