"""How far fine-tuning moved the routing and the experts of a run from its start, layer by layer.

python -m experiments.routing_drift --workdir=runs/tuned [--start=runs/base] [--text=own|start]
  [--step=N] [--tokens=32768] [--out=DIR] [--json]

Start and tuned model read the same held-out text: that of the tuned run, or with --text=start that
of the run it started from. Every checkpoint that the tuned run kept is a row. Writes drift.npz and
drift.png to WORKDIR/drift.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors

if TYPE_CHECKING:
  from moe_jax.analysis import observations
  from moe_jax.data import corpus as corpus_lib
  from moe_jax.runs import trained_run


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a tuned run')
  cli.path_flag('start', '', "the run or downloaded checkpoint it started from; its config's if ''")
  flags.DEFINE_enum('text', 'own', ['own', 'start'], 'whose held-out text both models read')
  flags.DEFINE_integer('step', None, 'one checkpoint only; all that were kept if not given')
  flags.DEFINE_integer('tokens', 32_768, 'held-out tokens to look at; 0 = all')
  cli.path_flag('out', '', 'directory of what is written; WORKDIR/drift without')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def _start_of(workdir: str) -> str:
  """Directory of the start.

  Raises:
    errors.InputError: neither the flag nor the run's record names one.
  """
  from moe_jax.runs import trained_run, working_directory

  if flags.FLAGS.start:
    return flags.FLAGS.start
  cfg = working_directory.resolved(trained_run.read_config(workdir, flags.FLAGS.step), workdir)
  errors.require(
    bool(cfg.init_from),
    f'--workdir={workdir} was trained from random weights (config.init_from is empty), so its '
    'routing has no start to be compared with; give one with --start=DIR, or name a tuned run',
  )
  return cfg.init_from


def _corpus(
  start: 'trained_run.Run', start_dir: str, tuned: 'trained_run.Run', workdir: str
) -> 'corpus_lib.Corpus':
  from moe_jax.runs import trained_run

  same = trained_run.digest(start.tokenizer) == trained_run.digest(tuned.tokenizer)
  errors.require(
    same,
    f'the tokenizers of --start={start_dir} and --workdir={workdir} differ, so the two models '
    'cannot read the same tokens; name the run that the tuned one started from',
  )

  def warn(line: str):
    print(line, file=sys.stderr)

  if flags.FLAGS.text == 'own':
    return trained_run.heldout_corpus(tuned, workdir, warn)
  errors.require(
    start.data_fingerprint != trained_run.NO_DATA,
    f'--text=start: the text that --start={start_dir} was trained on is not known; leave the flag '
    'out',
  )
  return trained_run.heldout_corpus(start, start_dir, warn)


def _observe(
  run: 'trained_run.Run', corpus: 'corpus_lib.Corpus', rows: 'trained_run.Run'
) -> 'observations.Observations':
  """What a model does with the text, in rows as the tuned run makes them."""
  from moe_jax.analysis import interventions, observations

  model = dataclasses.replace(run.cfg.model, max_seq_len=rows.cfg.model.max_seq_len)
  cfg = dataclasses.replace(rows.cfg, model=model)
  return observations.collect(
    interventions.Subject(cfg, run.variables, corpus, run.mesh), flags.FLAGS.tokens
  )


def _steps(workdir: str) -> list[int]:
  from moe_jax.runs import trained_run

  if flags.FLAGS.step is not None:
    return [flags.FLAGS.step]
  with trained_run.reader(pathlib.Path(workdir)) as reader:
    return sorted(reader.steps())


def main(unused_argv: Sequence[str]):
  """Prints a row per checkpoint, then the layers of the last one."""
  from moe_jax.analysis import assignments, drift_text, routing_drift
  from moe_jax.api import load
  from moe_jax.balance import routing_figures
  from moe_jax.runs import trained_run

  values, workdir = flags.FLAGS, cli.required('workdir')
  errors.require(values.tokens >= 0, f'--tokens={values.tokens} must be at least 0 (0 = all)')
  assignments.check(trained_run.read_config(workdir, values.step).model)
  start_dir = _start_of(workdir)
  start = load.read(start_dir, flag='--start')
  steps = _steps(workdir)
  tuned = trained_run.load(workdir, steps[-1])
  routing_drift.check(start.cfg.model, tuned.cfg.model)
  corpus = _corpus(start, start_dir, tuned, workdir)
  before = _observe(start, corpus, tuned)
  found: dict[int, routing_drift.Drift] = {}
  for step in steps:
    run = tuned if step == tuned.step else trained_run.load(workdir, step)
    after = _observe(run, corpus, tuned)
    found[step] = routing_drift.between(
      before, after, start.variables['params'], run.variables['params']
    )
  out = pathlib.Path(values.out or pathlib.Path(workdir) / 'drift')
  first_layer = tuned.cfg.model.num_dense_layers
  routing_figures.write(out / 'drift.npz', drift_text.arrays(found))
  drift_text.draw(found, first_layer, out / 'drift.png')
  if values.json:
    record = {'start': start_dir, 'text': values.text, 'tokens': int(before.mask.sum())}
    json_output.show(record | {'steps': drift_text.record(found)})
    return
  print(f'{int(before.mask.sum()):,} held-out tokens ({values.text} text); start: {start_dir}')
  print(drift_text.table(found))
  print(drift_text.layers(found[steps[-1]], first_layer, steps[-1]))
  print(f'wrote: {out / "drift.npz"} {out / "drift.png"}')


if __name__ == '__main__':
  cli.run(main, define_flags)
