r"""How a model uses demonstrations: flow to and from label words, what is lost without, a cache.

python -m experiments.anchors --workdir=runs/episodes --task=episodes [--sets=24 --queries=16]
  [--parts=flow,blocking,...] [--out=DIR] [--json]
python -m experiments.anchors --workdir=models/v2-lite --task=sst2 --examples=reviews.jsonl
python -m experiments.anchors --workdir=models/v2-lite --task=mine.json

Writes report.html, report.md, their figures and anchors.json to WORKDIR/anchors. `--task` is
episodes (of a run of configs/episodes.py), 'episodes?noise=20' for the same with every fifth word
from another class (or `classes`, `words` that differ), sst2, trec, agnews or emoc, the templates of
the paper (arXiv 2305.14160), or a file {"template": "Review: {text}\nSentiment: {label}\n",
"labels": ["Positive", "Negative"], "examples": "reviews.jsonl"}. Lines of examples have a "text"
and a "label", which is a label word or its number.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, json_output
from moe_jax import atomic_files, errors


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run, or of a downloaded checkpoint', bucket=True)
  flags.DEFINE_string('task', 'episodes', 'what is asked: a name or a .json file')
  cli.path_flag('examples', '', 'file of JSON lines, for a template of the paper')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  flags.DEFINE_list('parts', ['all'], 'what is measured; an unknown one lists them all')
  flags.DEFINE_integer('sets', 24, 'demonstration sets, over which intervals are')
  flags.DEFINE_integer('queries', 16, 'queries of each set')
  flags.DEFINE_integer('batch', 32, 'prompts at a time')
  flags.DEFINE_integer('seed', 0, 'decides sets and random words')
  cli.path_flag(
    'out', '', 'directory of the report; WORKDIR/anchors without, unless that is in a bucket'
  )
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def _parts() -> list[str]:
  from moe_jax.analysis.anchors import measure

  names = list(flags.FLAGS.parts)
  if names == ['all']:
    return list(measure.PARTS)
  for name in names:
    errors.require(
      name in measure.PARTS,
      f'--parts={name} must be one of all, {", ".join(measure.PARTS)}'
      f'{errors.did_you_mean(name, measure.PARTS)}',
    )
  return names


def main(unused_argv: Sequence[str]):
  """Measures, and writes the report."""
  from experiments.anchors import report
  from moe_jax.analysis.anchors import measure, tasks
  from moe_jax.api import load
  from moe_jax.data.tasks import episodes
  from moe_jax.storage import urls

  values, workdir, parts = flags.FLAGS, cli.required('workdir'), _parts()
  errors.require(
    bool(values.out) or not urls.is_remote(workdir),
    f'--out is missing: the report is written to this disk, and --workdir={workdir} is a bucket; '
    'name a directory for it',
  )
  for name in ('sets', 'queries', 'batch'):
    least = 2 if name in ('sets', 'batch') else 1
    errors.require(
      values[name].value >= least, f'--{name}={values[name].value} must be at least {least}'
    )
  loaded = load.load(workdir, step=values.step, flag='--workdir')
  data = loaded.config.data
  trained = None
  if data.source == 'episodes':
    trained = episodes.of_path(data.path, 'config.data.path')
  task = tasks.of(values.task, values.examples, trained, data.chat_format)
  subject = measure.Subject(loaded.config.model, loaded.variables, loaded.tokenizer)
  settings = measure.Settings(values.sets, values.queries, values.batch, seed=values.seed)

  def say(line: str):
    if not values.json:
      print(line, file=sys.stderr, flush=True)

  found = measure.run(measure.prepare(subject, task, settings), parts, say)
  record = {'step': loaded.step, 'task': task.name, 'settings': settings._asdict()} | found
  out = pathlib.Path(values.out or pathlib.Path(workdir) / 'anchors')
  out.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out / 'anchors.json', json.dumps(record) + '\n')
  written = report.write(record, out)
  if values.json:
    json_output.show(record)
    return
  print('\n'.join(report.lines(record)))
  print('wrote: ' + ' '.join(map(str, [*written, out / 'anchors.json'])))


if __name__ == '__main__':
  cli.run(main, define_flags)
