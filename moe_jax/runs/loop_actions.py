"""What is done after the steps of a run: logging, routing figures, evaluation, saving, a bar.

Each action is a callback of `training.loop.run`. It acts for the members of the loop: one run, or
several seeds that are trained as one state with leaves [S, ...].
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import tqdm

from moe_jax import atomic_files, trees
from moe_jax.balance import routing_figures
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.processes import agreement
from moe_jax.runs import metric_log, trained_run
from moe_jax.storage import parts as parts_lib
from moe_jax.training import evaluate, loop, step_timer

Scalars = Callable[[Any], Mapping[str, float | None]]


def _whole(tree: trees.Tree) -> Any:
  return tree


@dataclasses.dataclass(frozen=True)
class Member:
  """One run among those of a loop, and where its files are."""

  cfg: schema.Config
  corpus: corpus_lib.Corpus
  workdir: pathlib.Path
  writer: metric_log.MetricWriter
  label: str = ''  # before its lines on the terminal
  take: Callable[[Any], Any] = _whole  # its own part of a tree of the loop's state or metrics
  stream: pipeline.StreamStart = pipeline.START
  parts: parts_lib.Parts | None = None  # where each process has a workdir of its own


@contextlib.contextmanager
def member(
  cfg: schema.Config,
  corpus: corpus_lib.Corpus,
  workdir: pathlib.Path,
  start: int,
  label: str = '',
  take: Callable[[Any], Any] = _whole,
  stream: pipeline.StreamStart = pipeline.START,
  parts: parts_lib.Parts | None = None,
) -> Iterator[Member]:
  """A member that goes on after step `start`; drops files of later steps, which come again."""
  first = agreement.is_first()
  writer = metric_log.MetricWriter(workdir, resume_step=start, enabled=first)
  if first:
    _drop_routing_after(workdir, start)
  with contextlib.closing(writer):
    yield Member(cfg, corpus, workdir, writer, label, take, stream, parts)


def _drop_routing_after(workdir: pathlib.Path, step: int):
  for path in (workdir / 'routing').glob('*.npz'):
    if path.stem.isdigit() and int(path.stem) > step:
      path.unlink()


def is_due(step: int, every: int) -> bool:
  """Whether `step` is one of every `every`; never with 0."""
  return bool(every) and step % every == 0


class ProgressBar:
  """Counts steps, and shows the last loss that was logged; on the first process's terminal only."""

  def __init__(self, start: int, total: int):
    disable = None if agreement.is_first() else True  # None: where there is a terminal
    self._bar = tqdm.tqdm(total=total, initial=start, unit='step', disable=disable)

  def __enter__(self) -> 'ProgressBar':
    return self

  def __exit__(self, *unused):
    self._bar.close()

  def after_step(self, unused_report: loop.StepReport):
    """Counts the step."""
    self._bar.update()

  def show(self, loss: float):
    """Appends a loss to the progress bar."""
    self._bar.set_postfix(loss=f'{loss:.3f}', refresh=False)


@dataclasses.dataclass(frozen=True)
class LogMetrics:
  """A line of metrics per member, to its files and to the terminal.

  Tokens per second and MFU are those of all members at once.
  """

  members: Sequence[Member]
  every: int
  scalars: Scalars  # waits for a step's metrics and returns its figures, among them `loss`
  timer: step_timer.StepTimer
  bar: ProgressBar
  say: trained_run.Say

  def after_step(self, report: loop.StepReport):
    """Logs every `every` steps and the last step of the run."""
    if not (report.complete or is_due(report.step, self.every)):
      return
    values = [self.scalars(one.take(report.metrics)) for one in self.members]
    speed = self.timer.report()
    for one, found in zip(self.members, values):
      line = {'step': report.step, **found, **speed}
      one.writer.write(line)
      self.say(one.label + metric_log.format_line(line))
    self.bar.show(sum(cast(float, found['loss']) for found in values) / len(values))


@dataclasses.dataclass
class WriteRoutingFigures:
  """Routing figures of a step's global batch, to `routing/<step>.npz` of each member.

  Where a file cannot be written that is said once, and this start of the run writes no more.
  """

  members: Sequence[Member]
  every: int
  timer: step_timer.StepTimer
  _failed: bool = False

  def after_step(self, report: loop.StepReport):
    """Writes every `every` steps and after the last step of the run; of MoE models only."""
    if not (report.complete or is_due(report.step, self.every)):
      return
    with self.timer.paused():
      for one in (one for one in self.members if one.cfg.model.is_moe):
        variables, stats = one.take((report.state.variables, report.metrics.stats))
        figures = evaluate.routing_figures(one.cfg.model, variables, stats)
        if agreement.is_first() and not self._failed:
          self._write(one.workdir / 'routing' / f'{report.step}.npz', figures)

  def _write(self, path: pathlib.Path, figures: Mapping[str, np.ndarray]):
    self._failed = True
    with atomic_files.dispensable(f'{path} (and routing figures of later steps)'):
      routing_figures.write(path, figures)
      self._failed = False


@dataclasses.dataclass(frozen=True)
class EvaluateMidway:
  """Held-out loss of a run that goes on, to TensorBoard and to the terminal."""

  members: Sequence[Member]
  every: int
  mesh: jax.sharding.Mesh
  timer: step_timer.StepTimer
  say: trained_run.Say
  stop_requested: Callable[[], str]  # asked before every batch; the name of a signal, '' to go on

  def after_step(self, report: loop.StepReport):
    """Evaluates every `every` steps, but not a run that ends here: its report does."""
    if report.last or not is_due(report.step, self.every):
      return
    try:
      self._evaluate(report)
    except evaluate.StoppedError as e:
      self.say(f'step={report.step} held-out evaluation left unfinished after {e}')

  def _evaluate(self, report: loop.StepReport):
    with self.timer.paused('evaluation'):
      for one in self.members:
        figures = evaluate.evaluate(
          one.cfg,
          one.take(report.state.variables),
          one.corpus,
          self.mesh,
          stop_requested=self.stop_requested,
        )
        scalars = {'heldout_loss': figures.loss, 'heldout_bits_per_byte': figures.bits_per_byte}
        scalars |= {f'heldout_{k}': value for k, value in (figures.preference or {}).items()}
        one.writer.write_scalars(report.step, scalars)
        self.say(f'step={report.step} ' + ' '.join(f'{k}={v:.4f}' for k, v in scalars.items()))


@dataclasses.dataclass(frozen=True)
class SaveCheckpoint:
  """The state of the loop, whole, with what belongs to it; the checkpointer refuses NaN in it."""

  members: Sequence[Member]
  checkpointer: checkpointer_lib.Checkpointer
  meta: trees.Json
  timer: step_timer.StepTimer

  def after_step(self, report: loop.StepReport):
    """Saves when the checkpointer says so, and when no step follows."""
    if not (report.last or self.checkpointer.is_due(report.step)):
      return
    # The steps in flight are training, what follows is not.
    jax.block_until_ready(report.state)
    with self.timer.saving():
      self.checkpointer.save(report.step, report.state, self.meta, force=report.last)
