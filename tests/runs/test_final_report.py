"""`finish` and `draw` are tested with a whole run in test_run.py."""

import errno
import gzip
import json
import random
import types

import numpy as np
import pytest

from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.runs import final_report, goodput
from moe_jax.training import evaluate
from tests import tiny
from tests.training.test_policy_loss import RUN


def test_compressors_report_bits_per_byte():
  noise = random.Random(0).randbytes(100_000)
  for value in final_report.compressed_bits_per_byte(noise).values():
    assert value == pytest.approx(8, rel=2e-3)  # noise does not compress; headers are small
  text = b'all work and no play ' * 5000
  expected = 8 * len(gzip.compress(text, 9)) / len(text)
  found = final_report.compressed_bits_per_byte(text)
  assert found['gzip -9'] == pytest.approx(expected) and 0 < found['xz -9'] < 0.1


def test_a_report_without_room_for_plots_is_whole_and_its_time_is_counted(
  tmp_path, monkeypatch, caplog
):
  figures = types.SimpleNamespace(
    as_dict=lambda step: {'step': step}, loss=3.0, routing=None, preference=None
  )
  monkeypatch.setattr(evaluate, 'evaluate', lambda *args, **kwargs: figures)
  clock = iter([10.0, 17.0, 19.0])
  monkeypatch.setattr(final_report.time, 'perf_counter', lambda: next(clock))

  def full(*unused):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(final_report.plots, 'loss_curve', full)
  cfg = tiny.make(train__sample_prompt='')
  run = types.SimpleNamespace(cfg=cfg, variables=None, mesh=None, step=3)
  heldout = types.SimpleNamespace(learned=None)
  corpus = types.SimpleNamespace(heldout_bytes=lambda: b'abc', heldout=heldout)
  said = []
  final_report.finish(run, corpus, tmp_path, said.append)
  assert (tmp_path / 'evaluation.json').exists() and 'No space left' in caplog.text
  assert said[-2].startswith('wrote: ') and 'plots' not in said[-2]
  seconds = goodput.read(tmp_path)
  assert (seconds['evaluation'], seconds['other']) == (7.0, 2.0)
  assert said[-1] == goodput.text(seconds)
  clock = iter([0.0, 7.0, 9.0])
  final_report.finish(run, corpus, tmp_path, said.append)  # the finished run is started again
  assert goodput.read(tmp_path) == seconds and said[-1] == goodput.text(seconds)


def test_a_report_without_room_for_routing_figures_is_whole(tmp_path, monkeypatch, caplog):
  figures = types.SimpleNamespace(as_dict=lambda step: {'step': step}, routing={}, preference=None)
  monkeypatch.setattr(final_report, 'draw', lambda *unused: [])

  def full(*unused):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(final_report.routing_figures, 'write', full)
  run = types.SimpleNamespace(cfg=tiny.make(train__sample_prompt=''), step=3)
  heldout = types.SimpleNamespace(learned=None)
  corpus = types.SimpleNamespace(heldout_bytes=lambda: b'abc', heldout=heldout)
  said = []
  final_report._write(run, corpus, tmp_path, figures, said.append)
  assert (tmp_path / 'evaluation.json').exists() and 'heldout.npz cannot be written' in caplog.text
  assert said[-1].startswith('wrote: ') and 'routing' not in said[-1]


def test_the_compressors_get_the_conversations_that_are_measured(tmp_path, monkeypatch):
  figures = types.SimpleNamespace(as_dict=lambda step: {}, routing=None, preference=None)
  monkeypatch.setattr(final_report, 'draw', lambda *unused: [])
  cfg = tiny.make(train__sample_prompt='', model__max_seq_len=16)
  sizes = np.array([4, 40, 17, 18])  # tokens; a row of 16 has 16 targets
  split = corpus_lib.TokenSplit(
    tokens=np.zeros(sizes.sum(), np.int32),
    offsets=np.concatenate([[0], np.cumsum(sizes)]),
    doc_bytes=np.array([3, 50, 20, 21]),
    doc_domain=np.zeros(4, np.int32),
    learned=np.ones(sizes.sum(), bool),
  )
  whole = b'aaa' + b'b' * 50 + bytes(range(20)) + b'd' * 21
  corpus = types.SimpleNamespace(heldout_bytes=lambda: whole, heldout=split)
  said = []
  run = types.SimpleNamespace(cfg=cfg, step=3)
  final_report._write(run, corpus, tmp_path, figures, said.append)
  want = final_report.compressed_bits_per_byte(b'aaa' + bytes(range(20)))
  record = json.loads((tmp_path / 'evaluation.json').read_text())
  assert record['compressors_bits_per_byte'] == want
  assert pipeline.num_bytes(split, 16) == 23 and 'of the same 23 bytes: gzip' in said[1]


def test_a_run_of_preferences_is_drawn_with_its_own_loss_and_rewards(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(final_report.metric_log, 'read_metrics', lambda workdir: 'lines')
  monkeypatch.setattr(final_report.plots, 'loss_curve', lambda *args: drawn.append(args))
  monkeypatch.setattr(final_report.preference_plot, 'draw', lambda *args: drawn.append(args))
  preference = {'preference_loss': 0.5}
  figures = types.SimpleNamespace(loss=3.0, routing=None, preference=preference)
  written = final_report.draw(tiny.make(), tmp_path / 'run', 7, figures)
  curve, rewards = (tmp_path / 'run' / 'plots' / name for name in ('loss.png', 'preferences.png'))
  assert written == [curve, rewards]
  assert drawn == [
    ('lines', curve, 'run: training loss', [(7, 0.5)], 'preference loss [nats per pair]'),
    ('lines', rewards, 'run: what is preferred', preference),
  ]


def test_a_run_of_rewards_is_drawn_with_what_it_won(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(final_report.metric_log, 'read_metrics', lambda workdir: 'lines')
  monkeypatch.setattr(final_report.plots, 'loss_curve', lambda *args: drawn.append(args))
  monkeypatch.setattr(final_report.policy_plot, 'draw', lambda *args: drawn.append(args))
  figures = types.SimpleNamespace(loss=3.0, routing=None, preference=None)
  written = final_report.draw(tiny.make(**RUN), tmp_path / 'run', 7, figures)
  curve, rewards = (tmp_path / 'run' / 'plots' / name for name in ('loss.png', 'rewards.png'))
  assert written == [curve, rewards]
  assert drawn == [
    ('lines', curve, 'run: training loss', [], 'policy loss'),
    ('lines', rewards, 'run: rewards of its answers', []),
  ]
