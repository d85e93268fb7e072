"""A poisoned weight and a poisoned batch: skipped, counted, stopped, dumped, and named again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from experiments import replay_step
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.runs import first_state, metric_log, train_run, trained_run
from tests import in_process

MAKE_MESH = partitioning.make_mesh


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(
    partitioning, 'make_mesh', lambda cfg, devices=None: MAKE_MESH(cfg, jax.devices()[:1])
  )


def train(tmp_path, allow=False, **overrides):
  page = smoke.get_config()
  page.update_from_flattened_dict(
    {
      'optim.warmup_steps': 0,
      'train.num_steps': 12,
      'train.log_every': 1,
      'train.routing_every': 0,
      'train.max_skipped_steps': 1,
      'checkpoint.save_every': 2,
      'data.synthetic_documents': 60,
      'data.heldout_fraction': 0.2,
      'data.cache_dir': str(tmp_path / 'cache'),
      **{key.replace('__', '.'): value for key, value in overrides.items()},
    }
  )
  cfg = parse.from_dict(page.to_dict())
  return train_run.run_training(
    cfg, tmp_path / 'run', allow_config_change=allow, say=lambda line: None
  )


@pytest.mark.slow
def test_a_nan_in_one_expert_is_named_by_layer_expert_and_matrix(
  one_device, tmp_path, monkeypatch, capsys
):
  random = first_state.random

  def poisoned(cfg, mesh, corpus):
    state = random(cfg, mesh, corpus)
    moe = state.params['moe_layers']['moe']
    moe['down'] = moe['down'].at[1, 5, 2, 3].set(jnp.nan)
    return state

  monkeypatch.setattr(first_state, 'random', poisoned)
  with pytest.raises(errors.InputError, match=r'skipped from step 1 \(rows 0 to 7 .*replay_step'):
    train(tmp_path)
  assert not [p for p in (tmp_path / 'run/checkpoints').iterdir() if p.name.isdigit()]
  capsys.readouterr()
  in_process.run(replay_step, f'--workdir={tmp_path / "run"}')
  said = capsys.readouterr().out
  assert 'weight of layer 2, expert 5, moe/down at [2, 3]' in said and 'loss=nan' in said


@pytest.mark.slow
def test_a_bad_batch_is_skipped_and_several_in_a_row_stop_with_the_rows(
  one_device, tmp_path, monkeypatch, capsys
):
  batches = pipeline.train_batches
  bad = {4}  # steps

  def poisoned(*args, start_step, **kwargs):
    for step, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start_step + 1):
      if step in bad:
        batch = {**batch, 'tokens': batch['tokens'].copy()}
        batch['tokens'][6, 9] = 10**6
      yield batch

  monkeypatch.setattr(pipeline, 'train_batches', poisoned)
  trained, _ = train(tmp_path)
  lines = metric_log.read_metrics(tmp_path / 'run')
  assert [line['skipped_steps'] for line in lines] == [0] * 3 + [1] * 9
  assert [line['step'] for line in lines if line['loss'] is None] == [4] and trained.step == 12
  kept = trained_run.load(tmp_path / 'run').variables

  bad |= {14, 15}
  with pytest.raises(errors.InputError, match=r'2 steps in a row were skipped from step 14 '):
    train(tmp_path, allow=True, train__num_steps=16)
  capsys.readouterr()
  in_process.run(replay_step, f'--workdir={tmp_path / "run"}', '--step=14')
  said = capsys.readouterr().out
  assert 'batch of token 1000000 at 9' in said and 'row 6 of the batch' in said
  assert np.isfinite(np.asarray(kept['params']['head'])).all()
