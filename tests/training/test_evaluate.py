"""Evaluation over a whole run's held-out text is tested in test_run.py; here the figures alone."""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import routing_figures
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.training import evaluate, preference_loss
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
  monkeypatch.setattr(pipeline, 'check_heldout', lambda *unused: None)
  monkeypatch.setattr(pipeline, 'num_rows', lambda split, length: 5)
  monkeypatch.setattr(
    pipeline, 'heldout_batches', lambda *unused: ({'domain_ids': i} for i in range(5))
  )
  monkeypatch.setattr(partitioning, 'put_global_batch', lambda batch, mesh: batch)
  monkeypatch.setattr(evaluate, '_sums', lambda *args: done.append(args) or np.zeros(3))
  corpus = types.SimpleNamespace(heldout=None)
  with pytest.raises(evaluate.StoppedError, match='SIGTERM'):
    evaluate.evaluate(tiny.make(), {}, corpus, tiny.mesh(), stop_requested=lambda: next(signals))
  assert len(done) == 2


def test_bits_per_byte_divide_by_the_held_out_bytes(monkeypatch):
  figures = preference_loss.Figures(*np.arange(1, 9, dtype=np.float32))
  sums = (np.float32(30.0), np.int32(10)), (np.float32(10.0), np.int32(6))
  parts = iter([(*pair, None, figures) for pair in sums])
  monkeypatch.setattr(pipeline, 'check_heldout', lambda *unused: None)
  monkeypatch.setattr(pipeline, 'num_rows', lambda split, length: 2)
  monkeypatch.setattr(
    pipeline, 'heldout_batches', lambda *unused: ({'domain_ids': i} for i in range(2))
  )
  monkeypatch.setattr(partitioning, 'put_global_batch', lambda batch, mesh: batch)
  monkeypatch.setattr(evaluate, '_sums', lambda *unused: next(parts))
  splits = dict(train=types.SimpleNamespace(num_bytes=999))
  corpus = types.SimpleNamespace(
    heldout=types.SimpleNamespace(num_bytes=25, learned=None), **splits
  )
  got = evaluate.evaluate(tiny.make(), {}, corpus, tiny.mesh(1))
  assert got.loss == pytest.approx(40 / 16)
  assert got.bits_per_byte == pytest.approx(40 / math.log(2) / 25)
  # Of 2 pairs in all: loss 4, 12 tokens chosen and 14 rejected, log-ratios 16.
  assert got.preference['preference_loss'] == 2 and got.preference['reference_kl'] == 16 / 26


def test_the_model_is_not_in_training_mode(monkeypatch):
  modes = []

  def apply(cfg, variables, *inputs, train=False, **options):
    modes.append(train)
    return types.SimpleNamespace(normed=jnp.ones((2, 4, 16)), stats=None)

  monkeypatch.setattr(transformer, 'apply', apply)
  batch = dict.fromkeys(('tokens', 'positions', 'segment_ids'), jnp.zeros((2, 4), jnp.int32))
  batch['targets'] = jnp.array([[1, 2, -1, 3], [0, -1, -1, -1]])
  variables = {'params': {'head': jnp.zeros((16, 32))}}
  nats, targets, *_ = evaluate._sums.__wrapped__(tiny.make().model, 4, None, variables, batch)
  assert modes == [False] and int(targets) == 4
  assert float(nats) == pytest.approx(4 * math.log(32), rel=1e-6)
