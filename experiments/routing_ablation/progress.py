"""A page of what is done, running, failed and left of a study, to read while it runs."""

import datetime
import pathlib
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.common import html_report, local_jobs
from experiments.routing_ablation import arms, measure
from moe_jax import atomic_files
from moe_jax.runs import metric_log

FAILURE = 'failure.txt'  # in the workdir of a run that ended in an error
EVERY = 20.0  # seconds between pages while a run trains


class Later(NamedTuple):
  """What follows a sweep of learning rates, whose rates are not known yet."""

  runs: Sequence[tuple[str, int]] = ()  # arm and seed
  words: str = ''  # about them, or about what cannot be counted


NOTHING = Later()


class Page:
  """`progress/report.html` and `.md` in the directory of a study.

  Every process of `--jobs` writes the same page, from what lies on the disk.

  Args:
    root: of the study.
    units: all that is to be trained, finished or not.
    later: what comes after these.
  """

  def __init__(self, root: pathlib.Path, units: Sequence[Any], later: Later = NOTHING):
    self._directory, self._units, self._written = root / 'progress', list(units), 0.0
    self._later = later

  def write_now_and_then(self):
    """`write`, if the last page is `EVERY` seconds old."""
    if time.monotonic() - self._written > EVERY:
      self.write()

  def write(self):
    """Writes the page anew."""
    self._written = time.monotonic()
    if self._units:
      with atomic_files.dispensable(self._directory):
        self._directory.mkdir(parents=True, exist_ok=True)
        html_report.write(blocks(self._units, local_jobs.jobs(), self._later), self._directory)


def failed(workdir: pathlib.Path, error: BaseException):
  """Leaves the error that ended a run in its workdir."""
  path = workdir / FAILURE
  with atomic_files.dispensable(path):
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, ''.join(traceback.format_exception(error)))


class _Run(NamedTuple):
  """How far a run is."""

  arm: str
  peak_lr: float | None  # None: of the sweep
  seed: int
  state: str  # done, running, failed or left
  share: float = 0.0  # of its steps
  bits: float | None = None  # held-out, per byte, of one that is done
  seconds: float | None = None  # that one took


def blocks(units: Sequence[Any], jobs: int, later: Later = NOTHING) -> list[html_report.Block]:
  """The page.

  Args:
    units: `study.Unit`s.
    jobs: processes that share what is left.
    later: what follows.
  """
  runs = [_look(unit, seed) for unit in units for seed in unit.seeds]
  runs += [_Run(arm, None, seed, 'left') for arm, seed in later.runs]
  rows: dict[tuple[str, float | None], list[_Run]] = {}
  for run in runs:
    rows.setdefault((run.arm, run.peak_lr), []).append(run)
  table = [
    [f'`{arm}`', 'best' if rate is None else f'{rate:g}', _ended(found), *_others(found)]
    for (arm, rate), found in rows.items()
  ]
  done = sum(run.state == 'done' for run in runs)
  now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
  return [
    html_report.Heading(f'{done} of {len(runs)} runs done', 1),
    html_report.Text(f'{now}. {_time_left(runs, jobs)} {later.words}'.rstrip()),
    html_report.Table(
      ['arm', 'peak rate', 'done: held-out bits per byte by seed', 'running', 'failed', 'left'],
      table,
    ),
    html_report.Text(
      f'A run that failed has its error in {FAILURE}; the same command tries it again.'
    ),
  ]


def _look(unit: Any, seed: int) -> _Run:
  """What lies in the workdir of a run."""
  where = unit.workdir / unit.arm / str(seed)
  which = unit.arm, unit.cfg.optim.peak_lr, seed
  ended = measure.read({unit.arm: unit.workdir}, [seed])[unit.arm].get(seed)
  if ended is not None:
    return _Run(*which, 'done', 1.0, ended[arms.BITS], ended['seconds'])
  if (where / FAILURE).exists():
    return _Run(*which, 'failed')
  logged = metric_log.read_metrics(where)
  share = logged[-1]['step'] / unit.cfg.train.num_steps if logged else 0.0
  return _Run(*which, 'running' if logged else 'left', share)


def _ended(found: Sequence[_Run]) -> str:
  return ', '.join(f'{run.seed}: {run.bits:.4f}' for run in found if run.bits is not None)


def _others(found: Sequence[_Run]) -> list[str]:
  cells = []
  for wanted in ('running', 'failed', 'left'):
    of_it = [run for run in found if run.state == wanted]
    cells.append(
      ', '.join(f'{run.seed}' + (f' ({run.share:.0%})' if run.share else '') for run in of_it)
    )
  return cells


def _time_left(runs: Sequence[_Run], jobs: int) -> str:
  """What the runs that ended took, of an arm or of its family, says how long the rest will."""
  seconds: dict[str, list[float]] = {}
  for run in runs:
    if run.seconds is not None:
      seconds.setdefault(run.arm, []).append(run.seconds)
  if not seconds:
    return 'How long the rest takes is known once a run has ended.'
  known = {arm: statistics.fmean(found) for arm, found in seconds.items()}
  usual = statistics.fmean(known.values())

  def of(arm: str) -> float:
    return known.get(arm, known.get(arms.ARMS[arm].family, usual))

  left = sum((1 - run.share) * of(run.arm) for run in runs)
  return (
    f'About {left / jobs / 3600:.1f} hours are left with {jobs} process(es), failures included.'
  )
