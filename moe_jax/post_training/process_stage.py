"""The stage of a run that learns which steps of solutions are good.

The batch of a step is a pure function of (seed, step): the solutions of the training split in an
order of its own for every pass, packed whole into rows. Soft labels are drawn, good as often as
completions were right, anew in every pass: their mean gradient is that of the soft cross-entropy.
"""

import json
import pathlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from moe_jax import atomic_files, errors, trees
from moe_jax.config import schema
from moe_jax.data import packing, sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.post_training import step_labels, step_scores, verification
from moe_jax.processes import agreement
from moe_jax.runs import trained_run
from moe_jax.training import loop, optimizer_step, train_state

RESULT_FILE = 'step_labels.json'  # of a workdir: how well held-out steps are told apart


class ProcessStage:
  """What a training loop asks: batches, what is logged, and when it may stop."""

  def __init__(self, cfg: schema.Config):
    """Reads the labels.

    Raises:
      errors.InputError: the file is not there or damaged, or none is held out, or all are.
    """
    self._cfg, self._process = cfg, cfg.objective.process_reward
    found = step_labels.read(self._process.labels, 'config.objective.process_reward.labels')
    held = [sources.is_heldout(one.question, cfg.data.heldout_fraction) for one in found]
    self._train = [one for one, out in zip(found, held) if not out]
    self._heldout = [one for one, out in zip(found, held) if out]
    errors.require(
      bool(self._train) and bool(self._heldout),
      f'config.data.heldout_fraction={cfg.data.heldout_fraction} holds {len(self._heldout)} of '
      f'{len(found)} labelled solutions out; label more questions, or change it',
    )

  def batches(
    self,
    state: train_state.TrainState,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizer_lib.Tokenizer,
    workdir: pathlib.Path,
    say: Callable[[str], None],
  ) -> Generator[trees.HostBatch, None, None]:
    """Yields the batch of every step from `state` on; see `runs.fit.Stage`.

    Raises:
      errors.InputError: a token is missing, or too few solutions fit a row.
    """
    self._mesh, self._tokenizer, self._workdir, self._say = mesh, tokenizer, workdir, say
    cfg = self._cfg
    marker = step_scores.Marker(self._process, cfg.data, tokenizer)
    marked = marker.marked([solution(one) for one in self._train])
    length, size = cfg.model.max_seq_len, cfg.train.batch_size
    left_out = sum(len(one.ids) > length for one in marked)
    if left_out:
      say(f'{left_out} of {len(marked)} labelled solutions are longer than a row and left out')
    num_rows = len(list(step_scores.rows(marked, np.arange(len(marked)), length)))
    per_pass = num_rows // size
    errors.require(
      per_pass > 0,
      f'config.train.batch_size={size} asks for more rows than the {num_rows} that the labelled '
      'solutions fill; label more questions, or take a smaller one',
    )
    for step in range(int(state.step), cfg.train.num_steps):
      yield self._batch(marker, marked, *divmod(step, per_pass))

  def _batch(
    self, marker: step_scores.Marker, marked: list[step_scores.Marked], passes: int, place: int
  ) -> trees.HostBatch:
    """The batch at a place of a pass over the solutions."""
    cfg = self._cfg
    length, size = cfg.model.max_seq_len, cfg.train.batch_size
    rng = np.random.default_rng([cfg.train.seed, passes])
    order = list(step_scores.rows(marked, rng.permutation(len(marked)), length))
    chosen = rng.permutation(len(order))[place * size : (place + 1) * size]
    labels = [self._labels(marker, one, rng) for one in self._train]
    return packing.stack([step_scores.filled(marked, order[i], length, labels) for i in chosen])

  def _labels(
    self, marker: step_scores.Marker, one: step_labels.Labelled, rng: np.random.Generator
  ) -> np.ndarray:
    draws = rng.random(len(one.ends))
    if self._process.outcome:
      good = np.array([one.right])
    elif self._process.target == 'hard':
      good = np.array(one.hard)
    else:
      good = draws < np.array(one.soft)
    return np.where(good, marker.good_id, marker.bad_id)

  def after_step(self, report: loop.StepReport):
    """Judges the held-out steps when the run is complete."""
    if not report.complete:
      return
    run = trained_run.Run(
      self._cfg, self._mesh, report.state.variables, self._tokenizer, report.step, ''
    )
    found = quality(run, self._heldout)
    if agreement.is_first():
      self._say(
        f'held-out steps: area under the curve {found["auc"]:.3f}, accuracy '
        f'{found["accuracy"]:.1%} of {found["steps"]} (good: {found["good"]:.1%})'
      )
      atomic_files.write_text(self._workdir / RESULT_FILE, json.dumps(found, indent=2) + '\n')

  def may_stop(self) -> bool:
    """Always."""
    return True

  def scalars(self, metrics: optimizer_step.StepMetrics) -> dict[str, float | None]:
    """What is logged of a step."""
    return optimizer_step.host_metrics(metrics)


def solution(one: step_labels.Labelled) -> step_scores.Solution:
  """A labelled solution without its labels."""
  return step_scores.Solution(one.question, one.text, one.ends)


def quality(run: trained_run.Run, found: list[step_labels.Labelled]) -> dict[str, Any]:
  """How a model's scores agree with the labels of solutions, and with the truth where it is known.

  Args:
    run: see `step_scores.score`.
    found: labelled solutions; those longer than a row are left out.
  """
  process = run.cfg.objective.process_reward
  marker = step_scores.Marker(process, run.cfg.data, run.tokenizer)
  sizes = [len(one.ids) for one in marker.marked([solution(one) for one in found])]
  found = [one for one, size in zip(found, sizes) if size <= run.cfg.model.max_seq_len]
  scores = np.concatenate(step_scores.score(run, [solution(one) for one in found]))
  if process.outcome:
    good = np.array([one.right for one in found])
  else:
    good = np.concatenate([one.hard for one in found]).astype(bool)
  result: dict[str, Any] = {
    'auc': verification.auc(scores, good),
    'accuracy': float(((scores > 0.5) == good).mean()),
    'good': float(good.mean()),
    'steps': len(good),
  }
  if not process.outcome and all(one.truth is not None for one in found):
    truth = np.concatenate([np.array(one.truth, bool) for one in found])
    result |= {
      'auc_of_truth': verification.auc(scores, truth),
      'accuracy_of_truth': float(((scores > 0.5) == truth).mean()),
    }
  return result
