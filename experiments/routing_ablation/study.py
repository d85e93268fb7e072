"""The study from its arms to the report: checks, trains, measures, writes."""

import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from absl import flags

from experiments.common import cli, local_jobs
from experiments.routing_ablation import (
  arms,
  budget,
  earlier,
  finished,
  learning_rates,
  matching,
  measure,
  progress,
  report,
)
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.planning import describe
from moe_jax.runs import run_record, seeds, train_run, upcycle_run

MODULE = 'experiments.routing_ablation'
_SWEEP = 'rates'  # value of the internal flag --part


class Unit(NamedTuple):
  """Runs that one call trains."""

  arm: str
  cfg: schema.Config
  workdir: pathlib.Path  # that holds a directory for the arm
  seeds: tuple[int, ...]

  def finished(self) -> bool:
    """Whether every run of it has all its figures."""
    return all(measure.finished(self.workdir, self.arm, seed) for seed in self.seeds)


def main(unused_argv: Sequence[str]):
  """Checks, trains, measures, reports."""
  values = flags.FLAGS
  given = (values.steps, values.data_path, values.data_source, values.heldout_fraction)
  pages = {arm.name: arms.resolve(arm, values.scale, *given) for arm in arms.of_scale(values.scale)}
  asked = [arm.name for arm in arms.choose(values.arms, values.scale)]
  numbers = local_jobs.seeds(values.seeds)
  known = {}
  if values.earlier:
    known = earlier.read(pathlib.Path(values.earlier), pages, values.scale)
  root = pathlib.Path(values.workdir or '.' if values.dry_run else cli.required('workdir'))
  there = finished.arms_in(root, list(pages))
  if values.learning_rates:  # the sweep trains these
    there += [arms.ARMS[name].family for name in asked]
  names = [name for name in pages if name in {*asked, *known, *there}]
  described = matching.describe({name: pages[name] for name in names})
  _say_costs({name: described[name] for name in asked}, matching.check(described), pages, numbers)
  swept = _rates(root, asked, there, pages, known)
  if values.part == _SWEEP:
    return
  names = [name for name in names if name in asked or name in known or _has_rate(name, swept)]
  found = learning_rates.applied({name: pages[name] for name in names}, learning_rates.best(swept))
  if not local_jobs.is_shard() and (
    words := learning_rates.from_elsewhere(swept, {n: found[n] for n in asked}, values.scale)
  ):
    print(words, flush=True)
  known = _at_these_rates(known, found)
  workdirs = {
    name: learning_rates.workdir(root, found[name].optim.peak_lr) if _by_rate() else root
    for name in names
  }
  wanted = {name: [n for n in numbers if n not in known.get(name, {})] for name in asked}
  if values.budget_hours:
    wanted = _affordable(root, asked, found, known, workdirs, len(numbers))
  if values.dry_run:
    return
  units = _units(found, workdirs, wanted)
  _check_finished(units)
  _check_starts(units, known)
  stopped = None
  try:
    _train_all(root, units)
  except local_jobs.ShardError as error:
    stopped = error  # what has ended is reported first
  if not local_jobs.is_shard():
    here, left_out = finished.read(root, found, workdirs)
    print(*left_out, sep='\n', end='\n' if left_out else '', flush=True)
    results = earlier.joined(known, here)
    _report(root, {name: found[name] for name in results}, results, described, swept)
    _name_failures(units)
  if stopped:
    raise stopped


def _say_costs(
  asked: Mapping[str, describe.Description],
  matches: Sequence[str],
  pages: Mapping[str, schema.Config],
  numbers: Sequence[int],
):
  """Prints what the arms that are asked for cost, and what matches."""
  if not local_jobs.is_shard():
    print(matching.text(asked, pages, len(numbers)), *matches, sep='\n', flush=True)


def _by_rate() -> bool:
  """Whether arms are trained at rates of a sweep, each rate in a directory of its own."""
  return bool(flags.FLAGS.learning_rates or flags.FLAGS.rates_from)


def _has_rate(name: str, swept: learning_rates.Sweep) -> bool:
  """Whether it is known at which rate this call would train an arm; prints if not."""
  family = arms.ARMS[name].family
  if not flags.FLAGS.learning_rates or family in swept:
    return True
  if not local_jobs.is_shard() and not flags.FLAGS.dry_run:
    print(f'left out of the report: {name}: {family}, whose rate it has, is not swept like this')
  return False


def _rates(
  root: pathlib.Path,
  asked: Sequence[str],
  there: Sequence[str],
  pages: Mapping[str, schema.Config],
  known: measure.Results,
) -> learning_rates.Sweep:
  """What learning rates came to, in a sweep that is trained here and in reports that are given."""
  values = flags.FLAGS
  errors.require(
    not (values.rates_from and values.learning_rates),
    '--rates_from and --learning_rates cannot both be given: one takes the rates of a sweep, the '
    'other one sweeps; leave one out',
  )
  if values.rates_from:
    return learning_rates.of_report(pathlib.Path(values.rates_from))
  swept: learning_rates.Sweep = {}
  if values.earlier:
    swept = learning_rates.from_csv(pathlib.Path(values.earlier) / learning_rates.FILE)
  if values.learning_rates:
    swept = {**swept, **_sweep(root, asked, there, pages, known, swept)}
  return swept


def _at_these_rates(known: measure.Results, found: Mapping[str, schema.Config]) -> measure.Results:
  """The runs of `--earlier` that these configs would train.

  Raises:
    errors.InputError: some are of another length; or of another rate, where no rate is chosen here.
  """
  if _by_rate():
    kept = {name: earlier.at_rate(known[name], found[name]) for name in known}
    known = {name: runs for name, runs in kept.items() if runs}
  if flags.FLAGS.earlier:
    earlier.check(pathlib.Path(flags.FLAGS.earlier), known, found)
  return known


def _report(
  root: pathlib.Path,
  configs: Mapping[str, schema.Config],
  results: measure.Results,
  described: Mapping[str, describe.Description],
  swept: learning_rates.Sweep,
):
  """Writes the report of the arms that have runs."""
  if not configs:
    return
  values = flags.FLAGS
  speeds = earlier.speeds(pathlib.Path(values.earlier)) if values.earlier else {}
  written = report.write(
    pathlib.Path(values.out) if values.out else root / 'report',
    report.Study(
      values.scale,
      configs,
      results,
      measure.rates(root, configs, speeds),
      {name: described[name] for name in configs},
      swept,
    ),
    commands=report.commands_of(sys.argv[1:], results, swept),
  )
  print('wrote: ' + ' '.join(str(path) for path in written))


def _name_failures(units: Sequence[Unit]):
  missing = [f'{u.arm} seed {",".join(map(str, u.seeds))}' for u in units if not u.finished()]
  errors.require(
    not missing,
    f'{len(missing)} of {len(units)} did not end, and are in no figure: {"; ".join(missing)}. '
    f'See above for why, and {progress.FAILURE} in their workdirs; the same command tries them '
    'again',
  )


def _units(
  configs: Mapping[str, schema.Config],
  workdirs: Mapping[str, pathlib.Path],
  wanted: Mapping[str, Sequence[int]],
) -> list[Unit]:
  """Groups of seeds, those of all arms in turn: a study that is stopped has whole pairs."""
  most = max(map(len, wanted.values()), default=0)
  size = flags.FLAGS.together or max(1, min(arms.SCALES[flags.FLAGS.scale].together, most))
  errors.require(size >= 1, f'--together={flags.FLAGS.together} must be at least 1')
  return [
    Unit(name, configs[name], workdirs[name], tuple(group))
    for i in range(0, most, size)
    for name, numbers in wanted.items()
    for group in _groups(name, workdirs[name], numbers[i : i + size])
  ]


def _groups(name: str, workdir: pathlib.Path, numbers: Sequence[int]) -> list[Sequence[int]]:
  """Seeds of an arm that train as one; of one that starts from other runs, each by itself.

  Those that are trained already stay by themselves: a group is trained whole or not at all.
  """
  if arms.ARMS[name].start:
    return [[n] for n in numbers]
  trained = [n for n in numbers if measure.path(workdir, name, n).exists()]
  return [group for group in (trained, [n for n in numbers if n not in trained]) if group]


def _chains(units: Sequence[Unit]) -> list[list[Unit]]:
  """What one process trains in this order: a unit, and those that start from its runs."""
  chains: list[list[Unit]] = []
  for unit in sorted(units, key=lambda unit: bool(arms.ARMS[unit.arm].start)):
    base = arms.ARMS[unit.arm].start, unit.workdir
    of_base = (
      chain
      for chain in chains
      if (chain[0].arm, chain[0].workdir) == base and unit.seeds[0] in chain[0].seeds
    )
    if (chain := next(of_base, None)) is None:
      chains.append([unit])
    else:
      chain.append(unit)
  return chains


def _sweep(
  root: pathlib.Path,
  asked: Sequence[str],
  there: Sequence[str],
  pages: Mapping[str, schema.Config],
  known: measure.Results,
  swept: learning_rates.Sweep,
) -> learning_rates.Sweep:
  """Trains the first arm of each family at every rate that it lacks; what came of it.

  Families of other arms that are there are among them if an earlier call has swept them likewise.
  """
  values = flags.FLAGS
  tried = learning_rates.rates(values.learning_rates)
  numbers = local_jobs.seeds(values.rate_seeds)
  families = list(dict.fromkeys(arms.ARMS[name].family for name in asked))

  def like(name: str, steps: int) -> Mapping[float, Mapping[int, float]]:
    return learning_rates.of_runs_like(swept, name, values.scale, steps)

  def units_of(names: Sequence[str]) -> list[Unit]:
    return [
      Unit(name, cfg, learning_rates.workdir(root, rate), (seed,))
      for seed in numbers
      for rate in tried
      for name in names
      for cfg in [learning_rates.with_rate(pages[name], rate)]
      if seed not in earlier.at_rate(known.get(name, {}), cfg)
      and seed not in like(name, cfg.train.num_steps).get(rate, {})
    ]

  units = units_of(families)
  if values.dry_run:
    print(f'--learning_rates: {len(units)} runs of {", ".join(families)} come first')
    return {}
  _check_finished(units)
  _train_all(root, units, [f'--part={_SWEEP}'], _after_sweep(asked, families, numbers, known))
  if values.part == _SWEEP:
    return {}
  missing = [f'{u.arm} at {u.cfg.optim.peak_lr:g}' for u in units if not u.finished()]
  errors.require(
    not missing,
    f'--learning_rates: {", ".join(missing)} did not end, see above for why; the same command '
    'tries again, or leave out a rate at which training fails',
  )
  others = dict.fromkeys(arms.ARMS[name].family for name in there)
  families += [
    name for name in others if name not in families and all(map(_is_swept, units_of([name])))
  ]
  lengths = {name: pages[name].train.num_steps for name in families}
  return learning_rates.read(root, values.scale, lengths, tried, numbers, known, swept)


def _after_sweep(
  asked: Sequence[str], families: Sequence[str], tried: Sequence[int], known: measure.Results
) -> progress.Later:
  """What follows a sweep, for the page of progress.

  Args:
    asked: arms of the study.
    families: arms that are swept; of each seed they have, one run will be the study's too.
    tried: the seeds of the sweep.
    known: runs of an earlier report, which are taken as runs at the best rate here.
  """
  values = flags.FLAGS
  if values.budget_hours:
    return progress.Later(words=f'Then follows what --budget_hours={values.budget_hours:g} plans.')
  runs = [
    (name, seed)
    for seed in local_jobs.seeds(values.seeds)
    for name in asked
    if seed not in known.get(name, {}) and not (name in families and seed in tried)
  ]
  words = (
    f'{len(runs)} of these runs follow at the best rates of the sweep, whose own runs at these '
    'are not counted twice.'
  )
  return progress.Later(runs, words if runs else '')


def _is_swept(unit: Unit) -> bool:
  """Whether an earlier call has trained a run of a sweep, with these settings."""
  return unit.finished() and not any(
    finished.changes(unit.workdir, unit.arm, seed, unit.cfg) for seed in unit.seeds
  )


def _affordable(
  root: pathlib.Path,
  asked: Sequence[str],
  configs: Mapping[str, schema.Config],
  known: measure.Results,
  workdirs: Mapping[str, pathlib.Path],
  first: int,
) -> dict[str, list[int]]:
  """The seeds of each arm that decide most within --budget_hours; prints the plan."""
  values = flags.FLAGS
  done, _ = finished.read(root, configs, workdirs)
  results = earlier.joined(known, done)
  seconds = budget.seconds_per_run(configs, results)
  elsewhere = {name: set(runs) - set(done.get(name, {})) for name, runs in known.items()}
  available = values.budget_hours * 3600 * max(1, values.jobs)
  plan = budget.plan(asked, results, seconds, available, first, elsewhere)
  if not local_jobs.is_shard():
    print(*budget.lines(plan, values.budget_hours, values.jobs), sep='\n', flush=True)
  return {name: [n for n in plan.seeds[name] if n not in known.get(name, {})] for name in asked}


def _check_finished(units: Sequence[Unit]):
  """Refuses a workdir whose finished runs had other settings, before anything is trained."""
  for unit in units:
    for one in seeds.configs(unit.cfg, unit.seeds):
      where = unit.workdir / unit.arm / str(one.train.seed)
      if (where / 'config.json').exists():
        run_record.check_workdir(where, one, allow_change=False, allow_longer=False)


def _check_starts(units: Sequence[Unit], known: measure.Results):
  """Refuses arms that start from runs that this call neither has nor trains."""
  trained = {(unit.arm, unit.workdir, seed) for unit in units for seed in unit.seeds}
  lacking: dict[tuple[str, pathlib.Path], list[int]] = {}
  for unit in units:
    start = arms.ARMS[unit.arm].start
    for seed in unit.seeds if start and not unit.finished() else ():
      there = upcycle_run.checkpoints(unit.workdir / unit.arm / str(seed))
      there = there or measure.path(unit.workdir, start, seed).exists()
      if not there and (start, unit.workdir, seed) not in trained:
        lacking.setdefault((unit.arm, unit.workdir), []).append(seed)
  for (name, workdir), numbers in lacking.items():
    start = arms.ARMS[name].start
    given = ','.join(map(str, numbers * 2 if len(numbers) == 1 else numbers))
    if set(numbers) <= set(known.get(start, {})):
      raise errors.InputError(
        f'--arms: {name} starts from runs of {start}, and those of --seeds={given} are in '
        f'--earlier alone, without checkpoints; train them here first, without --earlier '
        f'(--arms={start} --seeds={given} and the same --workdir), or leave {name} out'
      )
    raise errors.InputError(
      f'--arms: {name} starts from runs of {start}, and those of --seeds={given} are not in '
      f'{workdir / start}; name both, as in --arms={start},{name}, or leave {name} out'
    )


def _train_all(
  root: pathlib.Path,
  units: Sequence[Unit],
  more_flags: Sequence[str] = (),
  later: progress.Later = progress.NOTHING,
):
  """Trains those that are left; one that fails is left for the next call."""
  page, ended = progress.Page(root, units, later), []
  left = [unit for unit in units if not unit.finished()]
  refused: dict[str, set[str]] = {}  # what was said -> arms
  several = min(2, len({unit.arm for unit in left}))
  page.write()

  def train_chain(chain: Sequence[Unit]):
    for unit in chain:
      train(unit)

  def train(unit: Unit):
    try:
      _train(unit, page)
      ended.append(unit)
    except Exception as error:  # whatever it is, it is one arm's; the caller names it at the end
      if isinstance(error, errors.InputError) and not ended:
        refused.setdefault(str(error), set()).add(unit.arm)
        if len(refused[str(error)]) == several:
          raise  # what was asked for cannot be had, by the other arms as little
      progress.failed(unit.workdir / unit.arm / str(unit.seeds[0]), error)
      print(f'{unit.arm} seed {unit.seeds[0]} failed: {error}', file=sys.stderr, flush=True)
    page.write()
    jax.clear_caches()  # dozens of compiled models would fill the memory

  local_jobs.run(MODULE, _chains(left), train_chain, more_flags)


def _train(unit: Unit, page: progress.Page):
  """Trains one arm with some seeds, if they are not, and writes what is measured of each."""
  if not all(measure.path(unit.workdir, unit.arm, seed).exists() for seed in unit.seeds):
    _train_and_evaluate(unit, page)
  for seed in unit.seeds:
    measure.probe(unit.workdir, unit.arm, seed)
    (measure.path(unit.workdir, unit.arm, seed).parent / progress.FAILURE).unlink(missing_ok=True)


def _train_and_evaluate(unit: Unit, page: progress.Page):
  def say(unused_line: str):
    page.write_now_and_then()

  start, where = time.perf_counter(), unit.workdir / unit.arm
  if len(unit.seeds) == 1:
    (one,) = seeds.configs(unit.cfg, unit.seeds)
    if arms.ARMS[unit.arm].start:
      _make_of_start(unit, one)
    trained = train_run.run_training(one, where / str(one.train.seed), argv=sys.argv, say=say)
    runs, corpora = [trained[0]], [trained[1]]
  else:
    runs, corpora = seeds.run_training(unit.cfg, unit.seeds, where, argv=sys.argv, say=say)
  if runs[0].interrupted_by:
    raise KeyboardInterrupt
  seconds = (time.perf_counter() - start) / len(unit.seeds)
  for trained, corpus in zip(runs, corpora):
    print(measure.write(unit.workdir, unit.arm, trained, corpus, seconds), flush=True)


def _make_of_start(unit: Unit, cfg: schema.Config):
  """Gives a run that has no checkpoint yet the weights of the run that its arm starts from."""
  start, seed = arms.ARMS[unit.arm].start, cfg.train.seed
  where = unit.workdir / unit.arm / str(seed)
  if upcycle_run.checkpoints(where):
    return
  base = measure.path(unit.workdir, start, seed)
  errors.require(
    base.exists(),
    f'{unit.arm} starts from the run of {start} in {base.parent}, which has not ended; '
    f'{progress.FAILURE} there says why, and the same command tries both again',
  )
  upcycle_run.create(base.parent, None, cfg, where, argv=sys.argv)
