"""Trains the points of the study phase by phase, and writes the report once all are there."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm
from absl import flags

from experiments.common import cli, local_jobs, study_record
from experiments.scaling_laws import report, study, trainer
from moe_jax import atomic_files, errors
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.training import stop_signal

MODULE = 'experiments.scaling_laws'


def main(unused_argv: Sequence[str]):
  """Trains what is missing, fits, writes."""
  scale, values = study.SCALES[cli.required('scale')], flags.FLAGS
  for name, known in (('phases', study.PHASES), ('kinds', study.KINDS)):
    wrong = sorted(set(values[name].value) - set(known))
    errors.require(not wrong, f'--{name}={",".join(wrong)} must be among {", ".join(known)}')
  if values.dry_run:
    points = [point for phase in values.phases for point in _points(scale, phase, study.PAPER)]
    print(report.plan(scale, [(point, _page(scale, point)) for point in points]))
    return
  if values.points:
    _write(scale, report.read_points(pathlib.Path(values.points)))
    return
  workdir = pathlib.Path(cli.required('workdir'))
  given = {'scale': scale.name, 'data_source': values.data_source, 'data_path': values.data_path}
  study_record.check(workdir, given)
  # Two stages, since the grid decides how the profiles are trained; within one, a model is compiled
  # once.
  for stage in (('hyper', 'noise'), ('isoflop', 'heldout')):
    phases = [phase for phase in stage if phase in values.phases]
    points = [p for phase in phases for p in _points(scale, phase, _laws(scale, workdir, phase))]
    models = _models(_unfinished(points, workdir), local_jobs.jobs())

    def train_one(found):
      return _train(scale, found, workdir)

    local_jobs.run(MODULE, models, train_one, [f'--phases={",".join(phases)}'])
  if not local_jobs.is_shard():
    _report(scale, workdir)


def _report(scale: study.Scale, workdir: pathlib.Path):
  """Writes the report once every point of the study is there."""
  laws = _laws(scale, workdir, 'isoflop')
  points = [
    point
    for phase in study.PHASES
    for kind in study.KINDS
    for point in study.points(scale, phase, kind, laws, _length(scale))
  ]
  missing = sum(not _path(workdir, point).exists() for point in points)
  if missing:
    print(f'{missing} of {len(points)} points are not trained yet; the report needs all of them')
    return
  _write(scale, [_row(point, _page(scale, point), workdir) for point in points])


def _write(scale: study.Scale, rows: Sequence[Mapping[str, Any]]):
  out = flags.FLAGS.out or str(pathlib.Path(__file__).parent / 'results' / scale.name)
  written = report.write(pathlib.Path(out), scale, rows)
  print('wrote: ' + ' '.join(str(path) for path in written))


def _page(scale: study.Scale, point: study.Point) -> schema.Config:
  given = {'source': flags.FLAGS.data_source, 'path': flags.FLAGS.data_path}
  overrides = {key: value for key, value in given.items() if value}
  return study.page(scale, point.kind, point.dial, overrides)


def _length(scale: study.Scale) -> int:
  dial = next(iter(scale.hyper_dials.values()))
  return study.page(scale, 'dense', dial, {}).model.max_seq_len


def _points(scale: study.Scale, phase: str, laws: study.Laws) -> list[study.Point]:
  """The points of a phase, of the families that were asked for."""
  return [
    point
    for kind in flags.FLAGS.kinds
    for point in study.points(scale, phase, kind, laws, _length(scale))
  ]


def _laws(scale: study.Scale, workdir: pathlib.Path, phase: str) -> study.Laws:
  """What the grid says, for the phases that follow it; the grid itself needs no laws.

  Raises:
    errors.InputError: the grid is not finished.
  """
  if phase in ('hyper', 'noise'):
    return study.PAPER
  points = study.points(scale, 'hyper', 'dense', study.PAPER, _length(scale))
  missing = sum(not _path(workdir, point).exists() for point in points)
  errors.require(
    not missing,
    f'--phases={phase} takes rate and batch from phase hyper, of which {missing} of {len(points)} '
    f'points are missing in {workdir}; train these first, with --phases=hyper --kinds=dense',
  )
  rows = [_row(point, _page(scale, point), workdir) for point in points]
  return study.fit_laws(study.seed_means(rows), scale.band)


def _path(workdir: pathlib.Path, point: study.Point) -> pathlib.Path:
  return workdir / 'points' / f'{point.key}.json'


def _row(point: study.Point, cfg: schema.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """A finished point, what it cost and what came of it."""
  outcome = json.loads(_path(workdir, point).read_text())
  return study.row(point, cfg) | outcome


def _models(points: Sequence[study.Point], jobs: int) -> list[list[study.Point]]:
  """Points by model, those of each dealt out to the jobs: the points of a model share a program."""
  models = {}
  for point in points:
    models.setdefault((point.kind, point.dial), {})[point.key] = point
  return [list(found.values())[i::jobs] for found in models.values() for i in range(jobs)]


def _unfinished(points: Sequence[study.Point], workdir: pathlib.Path) -> list[study.Point]:
  return [point for point in points if not _path(workdir, point).exists()]


def _train(scale: study.Scale, points: Sequence[study.Point], workdir: pathlib.Path):
  """Trains points of one model, if there are any.

  Raises:
    KeyboardInterrupt: a signal came; the point in progress is saved.
    errors.InputError: the text is too short for a point, see `Scale.max_epochs`.
  """
  if not points:
    return
  (workdir / 'points').mkdir(parents=True, exist_ok=True)
  cfg = _page(scale, points[0])
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, 0)
  _check_text(scale, cfg, corpus, points)
  with stop_signal.StopSignal() as stop:
    model = trainer.Trainer(cfg, corpus, 2 * scale.rows[-1])
    for point in tqdm.tqdm(points, unit='point', leave=False):
      outcome = model.run(study.recipe(point, cfg), workdir / 'unfinished' / point.key, stop)
      if outcome is None:
        raise KeyboardInterrupt
      text = json.dumps(dataclasses.asdict(outcome), indent=2) + '\n'
      atomic_files.write_text(_path(workdir, point), text)
      tqdm.tqdm.write(
        f'{point.key}: {outcome.bits_per_byte:.4f} bits per byte, {outcome.seconds:.0f} s'
      )
  jax.clear_caches()  # dozens of compiled models would fill the memory


def _check_text(
  scale: study.Scale,
  cfg: schema.Config,
  corpus: corpus_lib.Corpus,
  points: Sequence[study.Point],
):
  most = max(study.tokens(point, cfg) for point in points)
  there = sum(split.num_tokens for split in corpus.train)
  errors.require(
    most <= scale.max_epochs * there,
    f'--scale={scale.name} trains {points[0].kind} model {points[0].dial} on {most:,} tokens, more '
    f'than {scale.max_epochs:g} times the {there:,} of the training split; give more text with '
    '--data_source and --data_path',
  )
