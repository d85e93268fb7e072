"""A page of what is done, running, failed and left of a study, to read while it runs."""

import datetime
import pathlib
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any

from experiments.common import html_report, local_jobs
from experiments.routing_ablation import arms, measure
from moe_jax import atomic_files
from moe_jax.runs import metric_log

FAILURE = 'failure.txt'  # in the workdir of a run that ended in an error
EVERY = 20.0  # seconds between pages while a run trains


class Page:
  """`progress/report.html` and `.md` in the directory of a study.

  Every process of `--jobs` writes the same page, from what lies on the disk.

  Args:
    root: of the study.
    units: all that is to be trained, finished or not.
  """

  def __init__(self, root: pathlib.Path, units: Sequence[Any]):
    self._directory, self._units, self._written = root / 'progress', list(units), 0.0

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
        html_report.write(blocks(self._units, local_jobs.jobs()), self._directory)


def failed(workdir: pathlib.Path, error: BaseException):
  """Leaves the error that ended a run in its workdir."""
  path = workdir / FAILURE
  with atomic_files.dispensable(path):
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, ''.join(traceback.format_exception(error)))


def blocks(units: Sequence[Any], jobs: int) -> list[html_report.Block]:
  """The page.

  Args:
    units: `study.Unit`s.
    jobs: processes that share what is left.
  """
  runs = [
    _state(unit.workdir / unit.arm / str(seed), unit, seed) for unit in units for seed in unit.seeds
  ]
  done = sum(state == 'done' for _, _, state, _, _ in runs)
  rows: dict[tuple[str, float], list[Any]] = {}
  for unit, seed, *rest in runs:
    rows.setdefault((unit.arm, unit.cfg.optim.peak_lr), []).append((seed, *rest))
  table = [
    [f'`{arm}`', f'{rate:g}', _ended(found), *_others(found)] for (arm, rate), found in rows.items()
  ]
  now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
  return [
    html_report.Heading(f'{done} of {len(runs)} runs done', 1),
    html_report.Text(f'{now}. {_time_left(runs, jobs)}'),
    html_report.Table(
      ['arm', 'peak rate', 'done: held-out bits per byte by seed', 'running', 'failed', 'left'],
      table,
    ),
    html_report.Text(
      f'A run that failed has its error in {FAILURE}; the same command tries it again.'
    ),
  ]


def _state(where: pathlib.Path, unit: Any, seed: int) -> tuple[Any, int, str, float, float | None]:
  """(unit, seed, state, share done, bits per byte) of a run."""
  if measure.finished(unit.workdir, unit.arm, seed):
    run = measure.read({unit.arm: unit.workdir}, [seed])[unit.arm][seed]
    return unit, seed, 'done', 1.0, run[arms.BITS]
  if (where / FAILURE).exists():
    return unit, seed, 'failed', 0.0, None
  logged = metric_log.read_metrics(where)
  share = logged[-1]['step'] / unit.cfg.train.num_steps if logged else 0.0
  return unit, seed, 'running' if logged else 'left', share, None


def _ended(found: Sequence[Any]) -> str:
  return ', '.join(f'{seed}: {bits:.4f}' for seed, _, _, bits in found if bits is not None)


def _others(found: Sequence[Any]) -> list[str]:
  cells = []
  for wanted in ('running', 'failed', 'left'):
    of_it = [(seed, share) for seed, state, share, _ in found if state == wanted]
    shares = [f'{seed}' + (f' ({share:.0%})' if share else '') for seed, share in of_it]
    cells.append(', '.join(shares))
  return cells


def _time_left(runs: Sequence[Any], jobs: int) -> str:
  """What the runs that ended took says how long the rest will."""
  seconds: dict[str, list[float]] = {}
  for unit, seed, state, _, _ in runs:
    if state == 'done':
      run = measure.read({unit.arm: unit.workdir}, [seed])[unit.arm][seed]
      seconds.setdefault(unit.arm, []).append(run['seconds'])
  if not seconds:
    return 'How long the rest takes is known once a run has ended.'
  known = {arm: statistics.fmean(found) for arm, found in seconds.items()}
  usual = statistics.fmean(known.values())
  left = sum((1 - share) * known.get(unit.arm, usual) for unit, _, _, share, _ in runs)
  return (
    f'About {left / jobs / 3600:.1f} hours are left with {jobs} process(es), failures included.'
  )
