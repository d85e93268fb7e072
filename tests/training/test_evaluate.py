"""Evaluation over a whole run's held-out text is tested in test_run.py; here the figures alone."""

import types

import numpy as np
import pytest

from moe_jax.balance import routing_figures
from moe_jax.data import packing, pipeline
from moe_jax.devices import partitioning
from moe_jax.training import evaluate
from tests import tiny


def test_figures_of_an_evaluation_by_hand():
  load = np.array([[7, 3, 1, 5], [4, 4, 4, 4]])  # means 4: (7 - 4) / 4 and 0
  routing = {'load': load, 'max_vio': np.array([0.75, 0.0]), 'drop_rate': np.array([0.0, 0.5])}
  figures = evaluate.Evaluation(loss=2.0, bits_per_byte=1.5, routing=routing)
  assert figures.max_vio_per_layer == [0.75, 0.0]
  assert figures.as_dict(3) == {
    'step': 3,
    'loss': 2.0,
    'bits_per_byte': 1.5,
    'max_vio': pytest.approx(0.375),
    'max_vio_per_layer': [0.75, 0.0],
    'routing': routing_figures.summary(routing),
  }


def test_a_dense_model_has_no_balance():
  figures = evaluate.Evaluation(loss=2.0, bits_per_byte=1.5, routing=None)
  assert figures.max_vio is None and figures.max_vio_per_layer == []


def test_an_evaluation_looks_for_a_signal_before_every_batch(monkeypatch):
  done, signals = [], iter(['', '', 'SIGTERM'])
  monkeypatch.setattr(packing, 'num_rows', lambda split, length: 5)
  monkeypatch.setattr(
    pipeline, 'heldout_batches', lambda *unused: ({'domain_ids': i} for i in range(5))
  )
  monkeypatch.setattr(partitioning, 'put_global_batch', lambda batch, mesh: batch)
  monkeypatch.setattr(evaluate, '_sums', lambda *args: done.append(args) or np.zeros(3))
  corpus = types.SimpleNamespace(heldout=None)
  with pytest.raises(evaluate.StoppedError, match='SIGTERM'):
    evaluate.evaluate(tiny.make(), {}, corpus, tiny.mesh(), stop_requested=lambda: next(signals))
  assert len(done) == 2
