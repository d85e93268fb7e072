"""When each action acts, on which values, and in which order; no model is trained."""

import contextlib
import errno
import types
from typing import NamedTuple

import numpy as np
import pytest

from moe_jax import atomic_files
from moe_jax.runs import loop_actions, metric_log
from moe_jax.training import evaluate, loop, step_timer
from tests import tiny

CFG = tiny.make(model__moe__num_experts=0)


class Metrics(NamedTuple):
  """What a stage reports, leaves [S] for S members."""

  loss: np.ndarray
  grad_norm: np.ndarray


class Bar:
  def __init__(self):
    self.shown = []

  def show(self, loss):
    self.shown.append(loss)


class Saver:
  """A checkpointer that is due every third step and notes what it is given."""

  def __init__(self):
    self.saved = []

  def is_due(self, step):
    return step % 3 == 0

  def save(self, step, state, meta, force):
    self.saved.append((step, state, meta, force))


def scalars(metrics):
  line = dict.fromkeys(metric_log.KEYS[1:])
  for key in step_timer.StepTimer(1.0, 1.0).report():
    del line[key]
  return line | {'loss': float(metrics.loss), 'grad_norm': 1.0, 'lr': 0.1}


@pytest.fixture
def members(tmp_path):
  """Two members of one loop."""
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(
        loop_actions.member(
          CFG,
          None,
          tmp_path / str(i),
          start=0,
          label=f'seed={i} ',
          take=lambda tree, i=i: (
            type(tree)(*(a[i] for a in tree))
            if hasattr(tree, '_fields')
            else tuple(a[i] for a in tree)
          ),
        )
      )
      for i in range(2)
    ]


def report(step, losses=(2.0, 4.0), **kwargs):
  return loop.StepReport(step, 'state', Metrics(np.array(losses), np.ones(2)), **kwargs)


def timer():
  return step_timer.StepTimer(flops_per_token=1.0, peak=1.0)


def test_each_member_logs_its_own_line_when_due_and_at_the_end_but_not_when_stopped(members):
  said, bar = [], Bar()
  log = loop_actions.LogMetrics(members, 2, scalars, timer(), bar, said.append)
  for step in (1, 2, 3):
    log.after_step(report(step))
  log.after_step(report(5, stopped_by='SIGTERM'))
  log.after_step(report(7, complete=True))
  for i, one in enumerate(members):
    lines = metric_log.read_metrics(one.workdir)
    assert [(line['step'], line['loss']) for line in lines] == [(2, 2.0 + 2 * i), (7, 2.0 + 2 * i)]
  assert [line.split(' lr')[0] for line in said] == [
    'seed=0 step=2 loss=2.0000',
    'seed=1 step=2 loss=4.0000',
    'seed=0 step=7 loss=2.0000',
    'seed=1 step=7 loss=4.0000',
  ]
  assert bar.shown == [3.0, 3.0]


def test_the_clock_is_read_after_the_step_is_done(members):
  """Steps are launched ahead: before a value of the last one is there, its time has not passed."""
  now = [0.0]
  clock = step_timer.StepTimer(flops_per_token=1.0, peak=1.0, clock=lambda: now[0])

  def wait(metrics):
    now[0] += 1.0
    return scalars(metrics)

  clock.add_tokens(20)
  loop_actions.LogMetrics(members, 1, wait, clock, Bar(), str).after_step(report(1))
  (line,) = metric_log.read_metrics(members[0].workdir)
  assert line['tokens_per_second'] == 10  # 20 tokens in the 2 seconds that two members waited


def test_a_state_is_saved_when_due_and_forced_when_no_step_follows(members):
  saver = Saver()
  save = loop_actions.SaveCheckpoint(members, saver, {'of': 'both'}, timer())
  for step in (1, 2, 3):
    save.after_step(report(step))
  save.after_step(report(4, stopped_by='SIGINT'))
  save.after_step(report(5, complete=True))
  meta = {'of': 'both'}
  assert saver.saved == [
    (3, 'state', meta, False), (4, 'state', meta, True), (5, 'state', meta, True)
  ]  # fmt: skip


def test_a_run_is_evaluated_on_the_way_and_not_at_its_end(members, monkeypatch):
  evaluated, said = [], []

  def figures(cfg, variables, corpus, mesh, stop_requested):
    if stop_requested():
      raise evaluate.StoppedError(stop_requested())
    evaluated.append(variables)
    preference = {'preference_accuracy': 0.75} if variables == 'second' else None
    return types.SimpleNamespace(loss=1.0, bits_per_byte=2.0, preference=preference)

  monkeypatch.setattr(evaluate, 'evaluate', figures)
  state = types.SimpleNamespace(variables=('first', 'second'))
  members = [
    loop_actions.Member(one.cfg, None, one.workdir, one.writer, take=lambda tree, i=i: tree[i])
    for i, one in enumerate(members)
  ]
  signals = []
  midway = loop_actions.EvaluateMidway(
    members, 2, None, timer(), said.append, lambda: ''.join(signals)
  )
  for step in (1, 2):
    midway.after_step(loop.StepReport(step, state, None))
  midway.after_step(loop.StepReport(4, state, None, complete=True))
  midway.after_step(loop.StepReport(4, state, None, stopped_by='SIGTERM'))
  assert evaluated == ['first', 'second']
  line = 'step=2 heldout_loss=1.0000 heldout_bits_per_byte=2.0000'
  assert said == [line, f'{line} heldout_preference_accuracy=0.7500']
  signals.append('SIGTERM')  # comes while the evaluation runs
  midway.after_step(loop.StepReport(6, state, None))
  assert evaluated == ['first', 'second']
  assert said[2:] == ['step=6 held-out evaluation left unfinished after SIGTERM']


def test_actions_that_are_off_or_not_due_look_at_nothing(members):
  class Untouchable:
    def __getattr__(self, name):
      raise AssertionError(f'{name} was read')

  hidden = loop.StepReport(1, Untouchable(), Untouchable())
  loop_actions.LogMetrics(members, 2, scalars, timer(), Bar(), str).after_step(hidden)
  loop_actions.WriteRoutingFigures(members, 0, timer()).after_step(hidden)
  loop_actions.EvaluateMidway(members, 0, None, timer(), str, str).after_step(hidden)
  loop_actions.SaveCheckpoint(members, Saver(), {}, timer()).after_step(hidden)


def test_routing_figures_without_room_are_said_once_and_the_run_goes_on(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(evaluate, 'routing_figures', lambda *args: {'load': np.ones((1, 2))})
  room, write, tried = [True], loop_actions.routing_figures.write, []

  def maybe_full(path, figures):
    tried.append(path.name)
    with atomic_files.told_if_full(path, 1):
      if not room[0]:
        raise OSError(errno.ENOSPC, 'No space left on device')
      write(path, figures)

  monkeypatch.setattr(loop_actions.routing_figures, 'write', maybe_full)
  state, metrics = types.SimpleNamespace(variables=None), types.SimpleNamespace(stats=None)
  with loop_actions.member(tiny.make(), None, tmp_path, start=0) as member:
    action = loop_actions.WriteRoutingFigures([member], 2, timer())
    for step in (2, 4, 6):
      action.after_step(loop.StepReport(step, state, metrics))
      room[0] = False
  assert tried == ['2.npz', '4.npz']
  assert [path.name for path in (tmp_path / 'routing').iterdir()] == ['2.npz']
  assert caplog.text.count('cannot be written, and the run goes on without') == 1
  assert '4.npz (and routing figures of later steps)' in caplog.text


def test_files_of_steps_that_come_again_are_dropped(tmp_path):
  (tmp_path / 'routing').mkdir()
  for name in ('2.npz', '3.npz', 'heldout.npz'):
    (tmp_path / 'routing' / name).touch()
  with loop_actions.member(CFG, None, tmp_path, start=2):
    assert sorted(p.name for p in (tmp_path / 'routing').iterdir()) == ['2.npz', 'heldout.npz']
