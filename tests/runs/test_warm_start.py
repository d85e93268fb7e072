"""Runs that start from the weights of another run: `config.init_from`."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.runs import checks, first_state, train_run, warm_start
from tests.runs import damaged_step

MAKE_MESH = partitioning.make_mesh
LATENT = {
  'model.attention.kind': 'mla',
  'model.attention.mla.kv_lora_rank': 8,
  'model.attention.mla.qk_nope_head_dim': 8,
  'model.attention.mla.qk_rope_head_dim': 4,
  'model.attention.mla.v_head_dim': 8,
  'model.attention.rope.layout': 'interleaved',
  'model.moe.expert_bias.update_rule': 'sign',
}
SIZES = {
  'optim.warmup_steps': 0,
  'train.num_steps': 2,
  'train.log_every': 1,
  'train.sample_prompt': '',
  'checkpoint.save_every': 2,
  'data.synthetic_documents': 120,
  'data.heldout_fraction': 0.2,
}


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def make(cache: pathlib.Path, **overrides) -> schema.Config:
  page = smoke.get_config()
  page.update_from_flattened_dict(LATENT | SIZES | {'data.cache_dir': str(cache)})
  page.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return parse.from_dict(page.to_dict())


@pytest.fixture(scope='module')
def source(cache, tmp_path_factory):
  """(workdir, trained run) of two steps."""
  workdir = tmp_path_factory.mktemp('runs') / 'source'
  trained, _ = train_run.run_training(make(cache), workdir, say=lambda line: None)
  return workdir, trained


def start(cache, source, **overrides):
  """(state before the first step, lines said) of a run that starts from `source`."""
  lines = []
  cfg = make(cache, init_from=str(source), **overrides)
  mesh, corpus = checks.prepare(cfg)
  return first_state.make(cfg, first_state.of_run(cfg), mesh, corpus, lines.append), lines


def test_an_older_step_is_started_from_with_its_own_config(cache, source, tmp_path):
  """The form of the bias decides whether it is taken over."""
  workdir, trained = source
  workdir = shutil.copytree(workdir, tmp_path / 'source')
  changes = {'model.moe.norm_topk_prob': not make(cache).model.moe.norm_topk_prob}
  damaged_step.add(workdir, changes | {'model.moe.expert_bias.form': 'multiplicative'})
  state, lines = start(cache, workdir)
  assert lines == [f'starting from the weights of {workdir}, step 2']
  biases = (state.router_state, trained.variables['router_state'])
  np.testing.assert_array_equal(*(model_variables.moe_state(b)['expert_bias'] for b in biases))


def test_an_older_step_that_does_not_fit_is_refused(cache, source, tmp_path):
  workdir = shutil.copytree(source[0], tmp_path / 'source')
  damaged_step.add(workdir, {'model.mlp_dim': 96})
  cfg = make(cache, init_from=str(workdir), model__mlp_dim=96)
  mesh, corpus = checks.prepare(cfg)
  weights = first_state.of_run(cfg)
  checks.check_source(cfg, weights.meta, corpus)  # the record of the newest step fits
  with pytest.raises(errors.InputError, match='model.mlp_dim: 64 -> 96'):
    first_state.make(cfg, weights, mesh, corpus, print)


def long_context(length: int = 128) -> dict:
  return dict(
    model__max_seq_len=length,
    model__attention__rope__yarn__factor=4.0,
    model__attention__rope__yarn__original_max_seq_len=32,
    data__tokenizer='bytes',
  )


def test_a_long_context_stage_starts_from_the_trained_weights(cache, source, tmp_path):
  workdir, trained = source
  lines = []
  cfg = make(cache, init_from=str(workdir), **long_context(), train__num_steps=1)
  last, _ = train_run.run_training(cfg, tmp_path / 'long', say=lines.append)
  assert f'starting from the weights of {workdir}, step 2' in lines
  changed = [line for line in lines if line.startswith('config changed against init_from')]
  assert any('max_seq_len' in line for line in changed)
  assert any('yarn.factor: 1.0 -> 4.0' in line for line in changed)
  assert last.step == 1 and last.cfg.model.max_seq_len == 128
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), last.variables['params'], trained.variables['params']
  )
  # AdamW moves a weight by about the learning rate in its first step.
  rate = cfg.optim.peak_lr
  assert all(0 < move < 3 * rate for move in jax.tree.leaves(moved)), moved


def test_every_weight_and_bias_is_taken_over_and_the_optimizer_is_fresh(cache, source):
  workdir, trained = source
  state, _ = start(cache, workdir)
  jax.tree.map(np.testing.assert_array_equal, state.params, trained.variables['params'])
  bias = [
    model_variables.moe_state(r)['expert_bias']
    for r in (state.router_state, trained.variables['router_state'])
  ]
  assert np.asarray(bias[1]).any()
  np.testing.assert_array_equal(*bias)
  assert int(state.step) == 0
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert moments and not any(np.asarray(x).any() for x in moments)


def test_other_routing_keeps_the_weights_and_starts_its_memory_anew(cache, source):
  state, _ = start(cache, source[0], model__moe__expert_bias__update_rule='none')
  assert not model_variables.moe_state(state.router_state)


def test_a_bias_of_another_form_starts_anew(cache, source):
  """Near 0 it would switch off every expert where the scores are multiplied by it."""
  form = {'model__moe__expert_bias__form': 'multiplicative'}
  state, lines = start(cache, source[0], **form)
  bias = model_variables.moe_state(state.router_state)['expert_bias']
  np.testing.assert_array_equal(bias, np.ones_like(bias))
  assert any('expert_bias.form: ' in line for line in lines)


def test_prediction_modules_are_taken_over_or_left_behind(cache, tmp_path):
  """A run without them starts from one that has them, and says so."""
  workdir = tmp_path / 'ahead'
  ahead = make(cache, model__num_mtp_layers=1, train__num_steps=1, train__sample_tokens=0)
  trained, _ = train_run.run_training(ahead, workdir, say=lambda line: None)
  for num in (0, 1):
    state, lines = start(cache, workdir, model__num_mtp_layers=num)
    assert ('mtp_layers' in state.params) == ('mtp_layers' in state.router_state) == bool(num)
    theirs = trained.variables['params']
    jax.tree.map(
      np.testing.assert_array_equal, state.params, {name: theirs[name] for name in state.params}
    )
    said = [line for line in lines if 'num_mtp_layers: 1 -> 0' in line]
    assert len(said) == (num == 0)


def test_weights_are_cast_to_the_new_runs_dtype(cache, source):
  state, _ = start(cache, source[0], model__param_dtype='bfloat16')
  want = source[1].variables['params']['embedding'].astype('bfloat16')
  np.testing.assert_array_equal(state.params['embedding'], want)


def refused(cache, source, tmp_path, message, **overrides):
  workdir = tmp_path / 'new'
  with pytest.raises(errors.InputError, match=message):
    cfg = make(cache, init_from=str(source), **overrides)
    train_run.run_training(cfg, workdir, say=lambda line: None)
  assert not (workdir / 'checkpoints').exists() and not (workdir / 'config.json').exists()


def test_other_sizes_are_refused_by_name(cache, source, tmp_path):
  message = (
    r'init_from=.* has \[1, 32, 12\] as params/.*kv_a, .* needs \[1, 32, 20\]'
    r'.*kv_lora_rank: 8 -> 16'
  )
  refused(cache, source[0], tmp_path, message, model__attention__mla__kv_lora_rank=16)


def test_modules_that_the_source_lacks_are_refused(cache, source, tmp_path):
  message = r'has nothing as params/mtp_layers/.*num_mtp_layers: 0 -> 1'
  refused(cache, source[0], tmp_path, message, model__num_mtp_layers=1)


def test_a_directory_without_checkpoints_is_refused(cache, source, tmp_path):
  refused(cache, tmp_path / 'nowhere', tmp_path, 'config.init_from=.* holds no checkpoints')


def test_a_run_goes_on_without_the_run_that_it_began_from(cache, source, tmp_path):
  """Once it has a checkpoint; before that it says what is missing."""
  base, workdir = tmp_path / 'base', tmp_path / 'tuned'
  shutil.copytree(source[0], base)

  def train(num_steps):
    cfg = make(cache, init_from=str(base), train__num_steps=num_steps, train__sample_tokens=0)
    return train_run.run_training(cfg, workdir, say=lambda line: None)[0]

  train(1)
  shutil.rmtree(base)
  assert train(2).step == 2
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(errors.InputError, match='init_from=.* holds no checkpoints'):
    train(2)


def test_another_tokenizer_is_refused_with_the_way_out(cache, source, tmp_path):
  message = r'--config.data.tokenizer=.*source/tokenizer.json'
  refused(cache, source[0], tmp_path, message, data__tokenizer='bpe')


def test_common_leaves():
  def leaf(*shape):
    return np.zeros(shape)

  a = {'x': {'bias': leaf(2), 'table': leaf(3), 'assignments': leaf(1)}, 'y': {'bias': leaf(2)}}
  b = {'x': {'bias': leaf(2), 'table': leaf(4), 'assignments': leaf(1)}}
  common = warm_start.common(a, b)
  assert list(common) == ['x'] and list(common['x']) == ['bias']
