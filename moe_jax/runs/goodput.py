"""Goodput: the share of a run's wall time in steps that count, over all of its starts.

`WORKDIR/goodput.json` holds the seconds of every phase. What was trained after the last save of a
start that was killed is done anew by the next one, so it counts as `restart`, as does the time of
each later start until the loop begins; that of the first is `start-up`. A finished run that is
started again trains nothing, and its file stays as it is.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from moe_jax import atomic_files
from moe_jax.training import loop, step_timer

NAME = 'goodput.json'
KEYS: tuple[str, ...] = (*step_timer.PHASES, 'start-up', 'restart')


def read(workdir: pathlib.Path) -> dict[str, float]:
  """Seconds of `KEYS` of a run's earlier starts; 0 where there is no file, or none of ours."""
  try:
    record = json.loads((workdir / NAME).read_text(encoding='utf-8'))
    seconds, saved = (
      {key: float(record[part].get(key, 0.0)) for key in KEYS} for part in ('all', 'saved')
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return dict.fromkeys(KEYS, 0.0)
  lost = seconds['steps'] - saved['steps']
  return seconds | {'steps': saved['steps'], 'restart': seconds['restart'] + lost}


def begin(workdir: pathlib.Path, spent: float) -> dict[str, float]:
  """Seconds of the earlier starts, and `spent` ones of this start until its loop."""
  seconds = read(workdir)
  seconds['restart' if any(seconds.values()) else 'start-up'] += spent
  return seconds


def add(workdir: pathlib.Path, step: int, spent: Mapping[str, float]) -> dict[str, float]:
  """Adds what a finished run did behind its loop to the file; returns the seconds of `KEYS`.

  Args:
    workdir: of the run.
    step: its last one. What was done behind it is added once, not by each start of a finished run.
    spent: seconds by key.
  """
  seconds = read(workdir)
  if _finished(workdir) == step:
    return seconds
  seconds |= {key: seconds[key] + value for key, value in spent.items()}
  with atomic_files.dispensable(workdir / NAME):
    _write(workdir, seconds, seconds, finished=step)
  return seconds


def _finished(workdir: pathlib.Path) -> int | None:
  """The step behind which `add` has added; None where training has gone on, or without a file."""
  try:
    return json.loads((workdir / NAME).read_text(encoding='utf-8'))['finished']
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _write(
  workdir: pathlib.Path,
  seconds: Mapping[str, float],
  saved: Mapping[str, float],
  finished: int | None = None,
):
  record = {'all': dict(seconds), 'saved': dict(saved), 'finished': finished}
  atomic_files.write_text(workdir / NAME, json.dumps(record) + '\n')


def text(seconds: Mapping[str, float]) -> str:
  """One line: 'goodput: 91.3% of 0:12:31 in steps; data 0.2% compile 4.0% ...'."""
  total = max(sum(seconds.values()), 1e-9)
  minutes, rest = divmod(round(total), 60)
  others = ' '.join(f'{key} {seconds[key] / total:.1%}' for key in KEYS if key != 'steps')
  clock = f'{minutes // 60}:{minutes % 60:02d}:{rest:02d}'
  return f'goodput: {seconds["steps"] / total:.1%} of {clock} in steps; {others}'


@dataclasses.dataclass
class Goodput:
  """The callback that keeps the file; it comes after the one that saves."""

  workdirs: Sequence[pathlib.Path]  # on the first process; none on the others
  timer: step_timer.StepTimer
  before: Mapping[str, float]  # of the earlier starts, and of this one until the loop
  is_due: Callable[[int], bool]  # whether something is logged at a step
  is_saved: Callable[[int], bool]  # whether its state is saved
  _saved: Mapping[str, float] | None = None  # seconds at the last save
  _failed: bool = False  # said once, and not tried again

  def seconds(self) -> dict[str, float]:
    """Seconds of `KEYS`, all starts together."""
    now = self.timer.seconds()
    return {key: self.before[key] + now.get(key, 0.0) for key in KEYS}

  def after_step(self, report: loop.StepReport):
    """Writes the file when a line is logged, and after a save."""
    saved = report.last or self.is_saved(report.step)
    if saved or self.is_due(report.step):
      self.write(saved)

  def write(self, saved: bool):
    """Writes the file; `saved`: so is the state of the run."""
    seconds = self.seconds()
    if saved:
      self._saved = seconds
    if self._failed:
      return
    self._failed = True
    with atomic_files.dispensable(NAME):
      for workdir in self.workdirs:
        _write(workdir, seconds, self._saved or self.before)
      self._failed = False
