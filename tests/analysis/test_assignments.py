"""Recording a model's choices, replaying them in training, and what they would cost on devices."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import routing, smoke
from moe_jax import errors
from moe_jax.analysis import assignments
from moe_jax.balance import routing_figures
from moe_jax.config import batch_sizes, parse, schema
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.runs import checks, metric_log, train_run, trained_run
from moe_jax.training import cross_entropy, train_state

MAKE_MESH = partitioning.make_mesh
SIZES = {
  'model.max_seq_len': 32,
  'model.num_layers': 2,
  'model.num_dense_layers': 0,
  'model.moe.dispatch': 'dense',
  'model.moe.num_experts': 8,
  'model.moe.num_experts_per_tok': 3,
  'data.synthetic_documents': 60,
  'data.heldout_fraction': 0.2,
  'optim.warmup_steps': 0,
  'train.seed': 3,  # that of the batches too
  'train.num_steps': 1,
  'train.batch_size': 8,
  'train.micro_batch_size': 4,
  'train.log_every': 1,
  'train.routing_every': 1,
  'train.sample_prompt': '',
}


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:2]))
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def make_config(cache: pathlib.Path, **overrides) -> schema.Config:
  page = smoke.get_config()
  page.update_from_flattened_dict(SIZES | {'data.cache_dir': str(cache)} | overrides)
  return parse.from_dict(page.to_dict())


@pytest.fixture(scope='module')
def fresh(cache):
  """(an untrained run, its corpus)."""
  cfg = make_config(cache)
  mesh, corpus = checks.prepare(cfg)
  variables = train_state.init_state(cfg, mesh).variables
  return trained_run.Run(cfg, mesh, variables, corpus.tokenizer, 0, corpus.fingerprint), corpus


@pytest.fixture(scope='module')
def recording(fresh):
  return assignments.collect(*fresh, num_batches=2)


@pytest.fixture(scope='module')
def first_batch(fresh):
  """(the first training batch, logits and choices of the model for it as a whole)."""
  loaded, corpus = fresh
  batches = pipeline.TrainBatches(
    corpus,
    seed=loaded.cfg.train.seed,
    max_seq_len=loaded.cfg.model.max_seq_len,
    batch_sizes=batch_sizes.of(loaded.cfg.train),
    num_steps=1,
  )
  batch = batches[0]
  inputs = {k: batch[k] for k in ('tokens', 'positions', 'segment_ids')} | {'row': np.arange(8)}
  apply = jax.jit(assignments.apply, static_argnums=0)
  return batch, *apply(loaded.cfg.model, loaded.variables, inputs)


def test_a_recording_has_the_rows_of_the_training_batches(first_batch, recording):
  assert recording.expert_idx.shape == (2, 16, 32, 3)
  assert recording.expert_idx.dtype == np.int32 and recording.mask.shape == (16, 32)
  assert recording.row.tolist() == [*range(8), *range(8)]
  assert recording.batch.tolist() == [0] * 8 + [1] * 8
  batch, _, want = first_batch
  np.testing.assert_array_equal(recording.mask[:8], batch['segment_ids'] > 0)
  np.testing.assert_array_equal(recording.expert_idx[:, :8], want)
  assert len(np.unique(recording.expert_idx[:, 0], axis=1)) > 1


@pytest.mark.slow  # compiles a training step
def test_a_recording_can_be_trained_on(fresh, first_batch, recording, cache, tmp_path):
  loaded, _ = fresh
  path = tmp_path / 'made' / 'assignments.npz'
  assignments.save(path, recording)
  overrides = assignments.replay_overrides(loaded.cfg.model, path, recording)
  assert overrides['model.moe.options.replay_rows'] == 16
  whole = {
    'train.micro_batch_size': 0
  }  # compiles faster; each row reads its own record all the same
  cfg = make_config(cache, **overrides, **whole)
  train_run.run_training(cfg, tmp_path / 'run', say=lambda line: None)
  # Step 1 starts from the same weights, so it computes the same as the recorded model.
  found = routing_figures.read(tmp_path / 'run/routing/1.npz')
  want = [np.bincount(layer[:8].ravel(), minlength=9)[:8] for layer in recording.expert_idx]
  np.testing.assert_array_equal(found['load'], want)
  batch, logits, _ = first_batch
  loss = cross_entropy.next_token(logits, batch['targets'])[0] / (batch['targets'] >= 0).sum()
  (point,) = metric_log.read_metrics(tmp_path / 'run')
  assert point['loss'] == pytest.approx(float(loss), rel=1e-5)


def test_two_groups_of_experts_become_one(tmp_path):
  model = parse.from_dict(routing.get_config().to_dict()).model
  for groups in (1, 2):
    moe = dataclasses.replace(model.moe, num_expert_groups=groups)
    k = moe.num_experts_per_tok
    found = assignments.Recording(np.zeros((3, 4, 8, k), np.int32), None, None, None)
    got = assignments.replay_overrides(dataclasses.replace(model, moe=moe), tmp_path / 'x', found)
    assert ('model.moe.num_expert_groups' in got) == (groups == 2)


@pytest.mark.parametrize(
  'variant', ['gshard', 'expert_choice', 'v3', 'ds_moe', 'hash', 'skewed', 'v2_dropping']
)
def test_overrides_make_a_legal_config(variant, tmp_path):
  page = routing.get_config(variant)
  model = parse.from_dict(page.to_dict()).model
  k = model.moe.num_experts_per_tok
  if variant in ('expert_choice', 'ds_moe'):
    k = model.moe.num_experts  # a column per expert
  expert_idx = np.zeros((3, 4, model.max_seq_len, k), np.int32)
  mask, rows = np.ones(expert_idx.shape[1:3], bool), np.arange(4)
  found = assignments.Recording(expert_idx, mask, rows, rows)
  overrides = assignments.replay_overrides(model, tmp_path / 'x.npz', found)
  page.update_from_flattened_dict(overrides)
  moe = parse.from_dict(page.to_dict()).model.moe
  assert moe.router == 'replay' and moe.num_experts_per_tok == k
  assert moe.options.replay_rows == 4
  json.dumps(overrides)


def by_hand(cache) -> tuple[assignments.Recording, schema.ModelConfig]:
  """One layer, 4 experts on 2 devices, K = 1; 2 batches of 2 rows of 4 tokens."""
  hot = np.zeros((2, 4))  # all tokens to expert 0, on device 0
  even = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
  expert_idx = np.concatenate([hot, even])[None, :, :, None].astype(np.int32)
  mask = np.ones((4, 4), bool)
  mask[3, 3] = False
  expert_idx[0, 3, 3] = 4
  overrides = {'model.moe.num_experts': 4, 'model.moe.num_experts_per_tok': 1}
  model = make_config(cache, **overrides).model
  return assignments.Recording(
    expert_idx, mask, np.array([0, 1, 0, 1]), np.repeat([0, 1], 2)
  ), model


def test_device_figures_by_hand(cache):
  found = assignments.device_figures(*by_hand(cache), 2, [1, 2], [1.0, 4.0])
  assert {key: value.tolist() for key, value in found.items()} == {
    'least_load': [0.0],  # of device 1 in batch 0
    'most_load': [2.0],
    # 2 in batch 0; 4 and 3 tokens in batch 1.
    'straggler_factor': [pytest.approx((2 + 4 / 3.5) / 2)],
    'devices_per_token': [1.0],
    'over_1': [0.0],
    'over_2': [0.0],
    # Row 1 is at home on device 1. 4 of 8 tokens travel in batch 0; in batch 1 the last two of row
    # 0 and the first two of row 1, of 7. 32 float32 there and back.
    'all_to_all_bytes_per_token': [pytest.approx((4 / 8 + 4 / 7) / 2 * 32 * 4 * 2)],
    'expert_drops_1': [pytest.approx((6 / 8 + 0) / 2)],  # room for 2, and for 2 of 7 / 4
    'device_drops_1': [pytest.approx((4 / 8 + 0) / 2)],  # room for 4, and for 4 of 7 / 2
    'expert_drops_4': [0.0],
    'device_drops_4': [0.0],
  }


def test_a_table_has_a_line_per_layer(cache):
  found = assignments.device_figures(*by_hand(cache), 2, [1], [1.0])
  lines = assignments.table(found, first_layer=1).splitlines()
  assert 'straggler factor' in lines[0] and '> 1' in lines[0] and 'device drops 1' in lines[0]
  assert lines[1].split() == '1 0.00 2.00 1.57 1.00 0.0% 137 37.5% 25.0%'.split()
  assert len(lines) == 3 and lines[2].split() == ['mean', *lines[1].split()[1:]]


def test_bad_requests(cache, tmp_path):
  dense = make_config(cache, **{'model.moe.num_experts': 0, 'model.num_dense_layers': 0})
  with pytest.raises(errors.InputError, match='dense model, which routes nothing'):
    assignments.check(dense.model)
  with pytest.raises(errors.InputError, match='--devices=7: .*choose a divisor of 8'):
    assignments.check_devices(make_config(cache).model.moe, 7)
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.InputError, match='--save=.*cannot be written: File exists'):
    assignments.check_writable(tmp_path / 'file' / 'x.npz')
  with pytest.raises(errors.InputError, match='--save=.* is a directory'):
    assignments.check_writable(tmp_path)
