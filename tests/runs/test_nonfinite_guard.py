"""When the guard looks, at which steps it ends a run, and what it keeps; no model is trained."""

import types
from typing import NamedTuple

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.runs import loop_actions, nonfinite_dump, nonfinite_guard
from moe_jax.training import loop
from tests import tiny

CFG = tiny.make(model__moe__num_experts=0, train__max_skipped_steps=2, train__batch_size=4)


class Metrics(NamedTuple):
  loss: np.ndarray
  grad_norm: np.ndarray
  skipped: object


def report(step, in_row, loss=(1.0, 2.0), **kwargs):
  skipped = types.SimpleNamespace(in_row=np.array(in_row))
  return loop.StepReport(
    step, f'state {step}', Metrics(np.array(loss), np.ones(2), skipped), **kwargs
  )


def batches(count):
  yield from ({'tokens': np.full((2, 1, 3), step)} for step in range(1, count + 1))


@pytest.fixture
def guarded(tmp_path, monkeypatch):
  """(guard of two members, the batches it sees, what it dumped)."""
  dumped = []

  def write(directory, one, figures, state, batch):
    dumped.append((directory.relative_to(tmp_path).as_posix(), figures, state, batch))

  monkeypatch.setattr(nonfinite_dump, 'write', write)

  def take(tree, i):
    if isinstance(tree, tuple):
      return tuple(a[i] for a in tree)
    return {k: v[i] for k, v in tree.items()} if isinstance(tree, dict) else tree[i]

  members = [
    loop_actions.Member(
      CFG, None, tmp_path / str(i), None, f'seed={i} ', lambda tree, i=i: take(tree, i)
    )
    for i in range(2)
  ]
  recent = nonfinite_guard.RecentBatches(batches(99), 0, nonfinite_guard.num_kept(CFG))
  guard = nonfinite_guard.NonfiniteGuard(
    members, recent, lambda batch: batch, lambda step: step == 50
  )
  return guard, recent, dumped


def run(guard, recent, in_rows, **last):
  """Reports steps 1, 2, ... with these counts of the second member."""
  for step, in_row in enumerate(in_rows, 1):
    next(recent)
    loss = (1.0, np.nan if in_row else 2.0)
    end = last if step == len(in_rows) else {}
    guard.after_step(report(step, (0, in_row), loss, **end))
  return step


def test_a_few_steps_in_a_row_are_borne(guarded):
  guard, recent, dumped = guarded
  run(guard, recent, [0, 1, 2, 0, 1, 2, 0], complete=True)
  assert not dumped


def test_one_more_ends_all_members_with_rows_and_a_dump_of_the_first(guarded):
  guard, recent, dumped = guarded
  message = (
    r'^seed=1 loss nan and gradient norm 1\.0 at step 6: training diverged with .*peak_lr=.*; 3 '
    r'steps in a row were skipped from step 4 \(rows 12 to 15 of the row stream\) on, and '
    r'config\.train\.max_skipped_steps=2\. .*1/nonfinite/4: .*replay_step --workdir=.*/1\.'
  )
  with pytest.raises(errors.InputError, match=message):
    run(guard, recent, [0, 0, 0, 1, 2, 3, 4, 5, 6])
  (where, figures, state, batch), = dumped  # fmt: skip
  assert where == '1/nonfinite/4' and figures['step'] == 4 and figures['last_step'] == 6
  assert state == 'state 8'  # found out two steps late: the devices have left it alone
  np.testing.assert_array_equal(batch['tokens'], np.full((1, 3), 4))


@pytest.mark.parametrize('last', [{'complete': True}, {'stopped_by': 'SIGTERM'}])
def test_the_last_step_is_not_passed_over(guarded, last):
  guard, recent, dumped = guarded
  with pytest.raises(errors.InputError, match='at step 3: training diverged'):
    run(guard, recent, [1, 2, 3], **last)
  assert dumped[0][1]['step'] == 1


def test_values_are_waited_for_when_others_wait_for_them_anyway(guarded):
  guard, _, dumped = guarded
  guard.batches = nonfinite_guard.RecentBatches(batches(99), 49, 3)
  next(guard.batches)
  with pytest.raises(errors.InputError, match='at step 50'):
    guard.after_step(report(50, (0, 3)))
  assert dumped[0][1]['step'] == 50  # resumed on the way: the first batch of this process


def test_a_dump_that_fails_does_not_hide_why_the_run_ends(guarded, monkeypatch):
  guard, recent, _ = guarded

  def full(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(nonfinite_dump, 'write', full)
  with pytest.raises(errors.InputError, match=r'at step 3: .*failed \(OSError: .*No space left'):
    run(guard, recent, [1, 2, 3], complete=True)
