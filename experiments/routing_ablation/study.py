"""The study from its arms to the report: checks, trains, measures, writes."""

import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import jax
from absl import flags

from experiments.common import cli, local_jobs
from experiments.routing_ablation import arms, matching, measure, report
from experiments.routing_ablation import earlier as earlier_lib
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.runs import run_record, seeds, train_run

MODULE = 'experiments.routing_ablation'


def main(unused_argv: Sequence[str]):
  """Checks, trains, measures, reports."""
  values = flags.FLAGS
  found = {
    arm.name: arms.resolve(arm, values.scale, values.steps, values.data_path, values.data_source)
    for arm in arms.choose(values.arms)
  }
  numbers = local_jobs.seeds(values.seeds)
  described = matching.describe(found)
  lines = matching.check(described)
  if not local_jobs.is_shard():
    print(matching.text(described, found, len(numbers)), *lines, sep='\n', flush=True)
  if values.dry_run:
    return
  workdir = pathlib.Path(cli.required('workdir'))
  known: measure.Results = {name: {} for name in found}
  if values.earlier:
    known = earlier_lib.read(pathlib.Path(values.earlier), found, numbers)
  every, numbers = numbers, [n for n in numbers if n not in next(iter(known.values()))]
  _check_finished(workdir, found, numbers)
  size = values.together or max(1, min(arms.SCALES[values.scale].together, len(numbers)))
  errors.require(size >= 1, f'--together={values.together} must be at least 1')
  groups = [numbers[i : i + size] for i in range(0, len(numbers), size)]
  units = [(name, group) for name in found for group in groups]
  pending = [
    (name, group)
    for name, group in units
    if not all(measure.finished(workdir, name, seed) for seed in group)
  ]
  local_jobs.run(MODULE, pending, lambda unit: _train(found[unit[0]], unit[0], unit[1], workdir))
  if local_jobs.is_shard():
    return
  rates = measure.rates(workdir, found)
  out = pathlib.Path(values.out) if values.out else workdir / 'report'
  results = earlier_lib.joined(known, measure.read(workdir, list(found), numbers), every)
  written = report.write(
    out,
    report.Study(values.scale, found, every, results, rates, described, measure.commits(results)),
    command=report.command_of(sys.argv[1:]),
  )
  print('wrote: ' + ' '.join(str(path) for path in written))


def _check_finished(
  workdir: pathlib.Path, found: Mapping[str, schema.Config], numbers: Sequence[int]
):
  """Refuses a workdir whose finished runs had other settings, before anything is trained."""
  if not numbers:  # all of them are of an earlier report
    return
  for name, cfg in found.items():
    for one in seeds.configs(cfg, numbers):
      where = workdir / name / str(one.train.seed)
      if (where / 'config.json').exists():
        run_record.check_workdir(where, one, allow_change=False, allow_longer=False)


def _train(cfg: schema.Config, name: str, group: Sequence[int], workdir: pathlib.Path):
  """Trains one arm with some seeds, if they are not, and writes what is measured of each."""
  if not all(measure.path(workdir, name, seed).exists() for seed in group):
    _train_and_evaluate(cfg, name, group, workdir)
  for seed in group:
    measure.probe(workdir, name, seed)
  jax.clear_caches()  # dozens of compiled models would fill the memory


def _train_and_evaluate(cfg: schema.Config, name: str, group: Sequence[int], workdir: pathlib.Path):
  say, start = (lambda line: None), time.perf_counter()
  if len(group) > 1:
    runs, corpora = seeds.run_training(cfg, group, workdir / name, argv=sys.argv, say=say)
  else:
    (one,) = seeds.configs(cfg, group)
    trained = train_run.run_training(one, workdir / name / str(group[0]), argv=sys.argv, say=say)
    runs, corpora = [trained[0]], [trained[1]]
  if runs[0].interrupted_by:
    raise KeyboardInterrupt
  seconds = (time.perf_counter() - start) / len(group)
  for trained, corpus in zip(runs, corpora):
    print(measure.write(workdir, name, trained, corpus, seconds), flush=True)
