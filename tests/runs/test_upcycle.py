"""Upcycled models against the dense model they come from, and training that goes on from them."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from experiments import upcycle
from moe_jax import atomic_files, errors
from moe_jax.analysis.comparison import workdirs
from moe_jax.balance import expert_similarity, routing_figures
from moe_jax.config import batch_sizes, parse, schema
from moe_jax.data import kept_files, pipeline
from moe_jax.devices import partitioning
from moe_jax.models import model_variables, transformer
from moe_jax.runs import checks, metric_log, train_run, trained_run, upcycle_run
from moe_jax.runs import upcycle as runs_upcycle
from moe_jax.training import cross_entropy
from tests import in_process, tiny
from tests.runs import damaged_step
from tests.storage import conftest as storage

MAKE_MESH = partitioning.make_mesh
objects = storage.objects
DENSE = tiny.make(
  model__moe__num_experts=0, model__moe__num_shared_experts=0, model__num_dense_layers=0
).model


def moe(width: int, experts: int, per_tok: int, shared: int = 0, **overrides):
  """A tiny MoE with normalised gates; the dense FFN is 24 wide."""
  values = dict(
    model__moe__moe_mlp_dim=width,
    model__moe__num_experts=experts,
    model__moe__num_experts_per_tok=per_tok,
    model__moe__num_shared_experts=shared,
    model__moe__norm_topk_prob=True,
    model__moe__dispatch='dense',  # compiles faster; the others compute the same
  )
  return tiny.make(**(values | overrides)).model


@functools.cache
def made(model: schema.ModelConfig, noise: float = 0.0):
  rng = jax.random.key(3)

  def make(params):
    return runs_upcycle.upcycle(DENSE, params, model, noise=noise, rng=rng)

  return tiny.jit(make)(tiny.params(DENSE))


@functools.cache
def logits(model: schema.ModelConfig):
  params = tiny.params(DENSE) if model is DENSE else made(model)
  state = {} if model is DENSE else tiny.router_state(model)
  rows = tiny.batch()
  apply = tiny.jit(
    lambda params, rows: (
      transformer.Transformer(model)
      .apply(
        {'params': params, 'router_state': state},
        rows['tokens'],
        rows['positions'],
        rows['segment_ids'],
      )
      .logits
    )
  )
  return np.asarray(apply(params, rows))[rows['segment_ids'] > 0]


@pytest.mark.parametrize(
  'model, layout',
  [
    (moe(24, 4, 2), (1, 0, 4)),
    (moe(12, 8, 4), (2, 0, 4)),
    (moe(6, 8, 4, model__num_dense_layers=0), (4, 0, 2)),
    (
      moe(8, 8, 4, 1, model__moe__score_func='sigmoid', model__moe__routed_scaling_factor=2.5),
      (3, 1, 4),
    ),
    (moe(12, 6, 2, model__moe__router='ds_moe', model__moe__norm_topk_prob=False), (2, 0, 3)),
    (
      moe(12, 8, 4, model__moe__num_expert_groups=4, model__moe__num_limited_groups=2),
      (2, 0, 4),
    ),
  ],
)
def test_the_start_is_the_dense_model(model, layout):
  assert runs_upcycle.plan(DENSE, model) == layout
  want = logits(DENSE)
  np.testing.assert_allclose(logits(model), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_raw_gates_start_below_the_dense_model():
  raw = moe(24, 4, 2, model__moe__norm_topk_prob=False)
  assert np.abs(logits(raw) - logits(DENSE)).max() > 0.1


def test_experts_hold_contiguous_slices_and_share_router_columns():
  params, dense = made(moe(6, 6, 3, shared=1)), tiny.params(DENSE)
  experts, mlp = params['moe_layers']['moe'], dense['dense_layers']['mlp']
  for copy in range(2):
    for i, block in enumerate([slice(6, 12), slice(12, 18), slice(18, 24)]):
      expert = copy * 3 + i
      np.testing.assert_array_equal(experts['gate_up'][:, expert], mlp['gate_up'][1:, :, :, block])
      np.testing.assert_array_equal(experts['down'][:, expert], 3 * mlp['down'][1:, block])
  np.testing.assert_array_equal(experts['shared']['gate_up'], mlp['gate_up'][1:, ..., :6])
  np.testing.assert_array_equal(experts['shared']['down'], mlp['down'][1:, :6])
  router = np.asarray(experts['router'])
  assert (router[..., :3] == router[..., :1]).all() and (router[..., 3:] == router[..., 3:4]).all()
  assert not np.isclose(router[..., 0], router[..., 3]).any()
  # The first layer stays dense; all else is copied.
  for tree, layers in ((params['dense_layers'], slice(0, 1)), (params['moe_layers'], slice(1, 3))):
    for name in ('attention', 'attention_norm', 'ffn_norm'):
      want = jax.tree.map(lambda a, layers=layers: a[layers], dense['dense_layers'][name])
      jax.tree.map(np.testing.assert_array_equal, tree[name], want)
  for name in ('embedding', 'head', 'final_norm'):
    jax.tree.map(np.testing.assert_array_equal, params[name], dense[name])


def test_the_routers_columns_are_those_of_a_fresh_model():
  model = moe(12, 8, 4)
  fresh = tiny.jit(lambda: partitioning.unbox(model_variables.init(model, jax.random.key(3))))()
  got, want = (p['moe_layers']['moe']['router'] for p in (made(model), fresh['params']))
  np.testing.assert_allclose(got, np.repeat(want[..., ::2], 2, axis=-1), rtol=1e-5)


def test_weights_take_the_types_of_the_new_model():
  model = moe(12, 8, 4, model__param_dtype='bfloat16')
  got = jax.tree.map(lambda a: (a.shape, a.dtype), made(model))
  assert got == jax.tree.map(lambda a: (a.shape, a.dtype), model_variables.abstract_params(model))


def alike(params) -> np.ndarray:
  experts = params['moe_layers']['moe']
  return np.asarray(expert_similarity.expert_similarity(experts['gate_up'], experts['down']))


def test_noise_has_the_asked_size_and_parts_the_copies():
  model = moe(24, 4, 2)
  np.testing.assert_allclose(alike(made(model)), 1, rtol=1e-6)
  noisy = made(model, noise=0.5)
  # Weights of mean 0: the cosine of w + n and w + n' is 1 / (1 + 0.5^2).
  np.testing.assert_allclose(alike(noisy), 0.8, atol=0.03)
  for name in ('gate_up', 'down'):
    exact, other = (p['moe_layers']['moe'][name] for p in (made(model), noisy))
    dense = tiny.params(DENSE)['dense_layers']['mlp'][name][1:]
    want = 0.5 * dense.reshape(2, -1).std(axis=1)
    np.testing.assert_allclose((other - exact).reshape(2, -1).std(axis=1), want, rtol=0.05)
  assert (noisy['embedding'] == made(model)['embedding']).all()


@pytest.mark.parametrize(
  'dense, model, message',
  [
    (moe(24, 4, 2), moe(24, 4, 2), 'from a dense run, with num_experts=0'),
    (DENSE, DENSE, 'num_experts=0 makes a dense model'),
    (DENSE, moe(24, 4, 2, model__num_mtp_layers=1), r'^config\.model\.num_mtp_layers=1 must be 0'),
    (
      dataclasses.replace(DENSE, num_mtp_layers=1),
      moe(24, 4, 2),
      r'--from holds a model with .*num_mtp_layers=1 must be 0.* start from a run without them',
    ),
    (
      DENSE,
      moe(24, 4, 2, model__vocab_size=48),
      r'vocab_size=48 must be that of the dense model in --from, 32; pass --config\.model\.vocab',
    ),
    (DENSE, moe(24, 4, 2, model__attention__head_dim=4), r'attention\.head_dim=4 .* 8; pass'),
    (DENSE, moe(24, 4, 2, model__mlp_dim=32), r'mlp_dim=32 .*, 24'),
    (DENSE, moe(10, 4, 2), r'moe_mlp_dim=10 must divide .* 24; for example 24, 12, 8, 6, 4, 3, 2'),
    (DENSE, moe(12, 4, 2, shared=2), 'num_shared_experts=2 must be below .* 24 / .*12 = 2'),
    (DENSE, moe(6, 8, 3, shared=1), 'num_experts=8 must be a multiple of 3.* choose 6 or 9'),
    (DENSE, moe(12, 8, 3), 'num_experts_per_tok=3 must be a multiple of 2.* choose 2 or 4'),
    (
      DENSE,
      moe(12, 8, 2, model__moe__router='hash', model__moe__norm_topk_prob=False),
      "router='hash' does not keep the 2 routed slices",
    ),
    (
      DENSE,
      moe(12, 8, 2, model__moe__num_expert_groups=8, model__moe__num_limited_groups=2),
      'num_expert_groups=8 makes groups of 1 experts; a group must hold whole copies',
    ),
  ],
)
def test_what_does_not_fit_is_refused(dense, model, message):
  with pytest.raises(errors.InputError, match=message):
    runs_upcycle.plan(dense, model)


# From here on: whole runs.


@pytest.fixture(scope='module', autouse=True)
def cheap():
  """One device, and no optimisation: compiling is most of the time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:1]))
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def make_config(cache, variant: str = '', **overrides) -> schema.Config:
  page = smoke.get_config(variant)
  values = {
    'data.cache_dir': str(cache),
    'data.synthetic_documents': 120,
    'data.heldout_fraction': 0.2,
    'model.max_seq_len': 64,
    'model.num_layers': 2,
    'model.moe.dispatch': 'dense',
    'optim.warmup_steps': 0,
    'train.num_steps': 8,
    'train.log_every': 1,
    'train.routing_every': 1,
    'train.sample_prompt': '',
  }
  page.update_from_flattened_dict(values)
  page.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return parse.from_dict(page.to_dict())


# Copies of the dense FFN, which is 64 wide in the page.
COPIES = dict(
  model__moe__moe_mlp_dim=64,
  model__moe__num_experts=4,
  model__moe__num_experts_per_tok=2,
  model__moe__num_shared_experts=0,
  model__moe__norm_topk_prob=True,
  optim__peak_lr=1e-4,
  train__num_steps=2,
)


@pytest.fixture(scope='module')
def dense(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('dense')
  train_run.run_training(make_config(cache, 'dense'), workdir, say=lambda line: None)
  return workdir


def first_loss(loaded: trained_run.Run, cfg: schema.Config) -> float:
  """Loss of a model on the first training batch of `cfg`."""
  _, corpus = checks.prepare(cfg)
  size = cfg.train.batch_size
  batch = pipeline.TrainBatches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=batch_sizes.BatchSizes(size),
    num_steps=1,
  )[0]
  inputs = [batch[key] for key in ('tokens', 'positions', 'segment_ids')]
  apply = jax.jit(transformer.Transformer(loaded.cfg.model).apply)
  total, _ = cross_entropy.next_token(apply(loaded.variables, *inputs).logits, batch['targets'])
  return float(total) / (batch['targets'] >= 0).sum()


def test_training_goes_on_from_the_dense_models_loss(cache, dense, tmp_path):
  cfg, lines = make_config(cache, **COPIES), []
  upcycle_run.create(dense, None, cfg, tmp_path, say=lines.append)
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['0']
  (line,) = lines
  assert 'upcycled step 8 into 4 experts: 4 copies of 1 of 1 slices, noise 0' in line
  assert 'expert similarity 1.000; evaluated, the start equals the dense model' in line
  loss, dense_loss = map(float, re.search(r'loss ([\d.]+) against ([\d.]+)', line).groups())
  assert loss == dense_loss
  train_run.run_training(cfg, tmp_path, say=lines.append)
  assert 'resuming after step 0 of 2' in lines
  made_of = {'from': str(dense), 'step': 8, 'noise': 0.0}
  assert workdirs.read(tmp_path).upcycled == made_of and workdirs.read(dense).upcycled == {}
  points = metric_log.read_metrics(tmp_path)
  assert [p['step'] for p in points] == [1, 2]
  want = first_loss(trained_run.load(dense), cfg)
  assert points[0]['loss'] == pytest.approx(want, abs=1e-5)
  assert want < metric_log.read_metrics(dense)[0]['loss'] - 0.5  # it has been trained
  figures = routing_figures.read(tmp_path / 'routing/1.npz')
  assert (figures['expert_similarity'] > 0.999).all()
  with pytest.raises(errors.InputError, match='already holds checkpoints'):
    upcycle_run.create(dense, None, cfg, tmp_path)


def test_an_older_step_is_compared_with_its_own_config(cache, dense, tmp_path):
  source = shutil.copytree(dense, tmp_path / 'dense')
  damaged_step.add(source, {'model.attention.rope.theta': 5e5})
  changed = make_config(cache, **COPIES, model__attention__rope__theta=5e5)
  with pytest.raises(errors.InputError, match='rope.theta=500000.0 must be that of the dense'):
    upcycle_run.create(source, None, changed, tmp_path / 'moe')
  upcycle_run.create(source, None, make_config(cache, **COPIES), tmp_path / 'moe', say=print)
  assert (tmp_path / 'moe' / 'checkpoints' / '0').is_dir()


def test_a_mesh_that_orders_its_devices_otherwise(cache, dense, tmp_path, monkeypatch):
  """As a TPU's does for another shape; and what speaks of text comes along."""

  def by_shape(mesh, devices=None):
    there = jax.devices()[:2]
    return MAKE_MESH(mesh, there[::-1] if mesh.fsdp > 1 else there)

  monkeypatch.setattr(partitioning, 'make_mesh', by_shape)
  (dense / kept_files.DIRECTORY).mkdir()
  (dense / kept_files.DIRECTORY / 'generation_config.json').write_text('{"eos_token_id": [1, 7]}')
  lines = []
  cfg = make_config(cache, **COPIES, mesh__data=1, mesh__fsdp=2)
  upcycle_run.create(dense, None, cfg, tmp_path, say=lines.append)
  shutil.rmtree(dense / kept_files.DIRECTORY)
  assert 'the start equals the dense model' in lines[0]
  assert (tmp_path / kept_files.DIRECTORY / 'generation_config.json').is_file()


def test_noise_and_raw_gates_are_said_to_differ(cache, dense, tmp_path):
  raw = COPIES | {'model__moe__norm_topk_prob': False}
  lines = []
  (tmp_path / 'config.json').write_text('{}')  # without checkpoints in nobody's way, but kept
  upcycle_run.create(dense, 8, make_config(cache, **raw), tmp_path, noise=0.3, say=lines.append)
  assert 'noise 0.3, expert similarity 0.9' in lines[0]
  assert 'differs from the dense model (noise, gates that are not divided by' in lines[0]
  record = json.loads((tmp_path / 'config.json').read_text())
  assert record['config']['model']['moe']['num_experts'] == 4
  assert (tmp_path / 'config.1.json').read_text() == '{}'


@pytest.mark.parametrize(
  'overrides, noise, message',
  [
    ({'data__tokenizer': 'bpe'}, 0.0, r'tokenizer of the dense run.*dense\d*/tokenizer\.json'),
    ({'train__batch_size': 4096}, 0.0, 'batch_size=4096 takes 4096 rows'),
    ({'model__moe__moe_mlp_dim': 48}, 0.0, 'moe_mlp_dim=48 must divide'),
    ({}, -1.0, '--noise=-1.0 must be a number of at least 0'),
    ({}, jnp.nan, '--noise=nan must'),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  cache, dense, tmp_path, overrides, noise, message
):
  workdir = tmp_path / 'new'
  with pytest.raises(errors.InputError, match=message):
    upcycle_run.create(
      dense, None, make_config(cache, **(COPIES | overrides)), workdir, noise=noise
    )
  assert not workdir.exists()


def test_the_command_reads_its_flags(dense, tmp_path):
  with pytest.raises(errors.InputError, match='model.embed_dim=256 must be that of the dense'):
    in_process.run(
      upcycle, f'--from={dense}', '--config=configs/base.py', f'--workdir={tmp_path}',
      '--config.model.vocab_size=288',
    )  # fmt: skip
  with pytest.raises(errors.InputError, match='^--from=.*nope holds no checkpoints'):
    in_process.run(
      upcycle, f'--from={tmp_path}/nope', '--config=configs/base.py', f'--workdir={tmp_path}'
    )
  with pytest.raises(errors.InputError, match='--from is missing: directory of a trained dense'):
    in_process.run(upcycle, '--config=configs/base.py', f'--workdir={tmp_path}')


def test_a_workdir_in_a_bucket_is_uploaded_as_one_that_is_whole(objects, monkeypatch):
  """The folder itself is made as any other, see above; here is what becomes of it."""

  def make(source, step, cfg, workdir, noise, argv, say):
    with atomic_files.lock(workdir):
      (workdir / 'checkpoints/0').mkdir(parents=True)
      (workdir / 'checkpoints/0/x').write_text(f'{source} {step} {noise}')

  monkeypatch.setattr(upcycle_run, '_create', make)
  upcycle_run.create('dense', 3, DENSE, 'gs://b1/moe', noise=0.5)
  assert set(objects.find('b1')) == {'b1/moe/checkpoints/0/x'}
  assert objects.cat_file('b1/moe/checkpoints/0/x') == b'dense 3 0.5'
  with pytest.raises(errors.InputError, match='--workdir=gs://b1/moe must hold nothing'):
    upcycle_run.create('dense', 3, DENSE, 'gs://b1/moe')
