"""Seeds as an axis: what runs of their own would do, the files of each, stopping and going on."""

import dataclasses
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax import atomic_files, errors
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.runs import checks, metric_log, run_record, seeds, train_run, trained_run
from moe_jax.training import optimizer_step, train_state
from tests import tiny

MAKE_MESH = partitioning.make_mesh
SEEDS = (3, 0)
ROUTERS = {
  'gshard': {'model__moe__options__random_second_expert': True},
  'hash': {'model__moe__router': 'hash', 'model__moe__balance__expert_level__weight': 0.0},
  'expert_choice': {'model__moe__router': 'expert_choice'},
  'bias': {'model__moe__score_func': 'sigmoid', 'model__moe__expert_bias__update_rule': 'sign'},
  'capacity': {'model__moe__dispatch': 'capacity', 'model__moe__capacity__policy': 'score'},
  'remat': {'model__remat': 'moe_core', 'train__micro_batch_size': 4},
  'dense': {'model__moe__num_experts': 0, 'model__moe__num_shared_experts': 0},
}


def make_config(cache: pathlib.Path, **overrides) -> schema.Config:
  page = smoke.get_config()
  page.update_from_flattened_dict(
    {
      'optim.warmup_steps': 0,
      'train.num_steps': 6,
      'train.log_every': 1,
      'train.routing_every': 3,
      'checkpoint.save_every': 2,
      'data.synthetic_documents': 120,
      'data.heldout_fraction': 0.2,
      'data.cache_dir': str(cache),
    }
  )
  page.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return parse.from_dict(page.to_dict())


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      partitioning, 'make_mesh', lambda cfg, devices=None: MAKE_MESH(cfg, jax.devices()[:1])
    )
    yield


QUICK = ('bias',)


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ROUTERS]
)
def test_a_step_of_all_is_a_step_of_each(name):
  # With a large eps the first step of AdamW is no sign of the gradient, but in proportion to it.
  cfg, mesh = tiny.make(optim__eps=1.0, **ROUTERS[name]), tiny.mesh(1)
  cfgs = seeds.configs(cfg, SEEDS)
  states = [train_state.init_state(one, mesh) for one in cfgs]
  rows = tiny.batch()
  others = {key: np.roll(a, 1, axis=0) for key, a in rows.items()}

  def stack(*leaves):
    return np.stack(leaves)

  together, batch = jax.tree.map(stack, *states), jax.tree.map(stack, rows, others)
  step_all = tiny.jit(jax.vmap(optimizer_step.step_function(cfg)))
  with partitioning.activate(mesh):
    got, figures = step_all(together, batch)
    _check_poisoned(step_all, together, batch, got)
    one_step = tiny.jit(optimizer_step.step_function(cfg))
    for i, own in enumerate((rows, others)):
      want, want_figures = one_step(states[i], own)
      tiny.assert_trees_close(seeds.take(got, i), want, rtol=1e-2, atol=5e-3)
      tiny.assert_trees_close(seeds.take(figures, i), want_figures, rtol=1e-3, atol=1e-4)


def _check_poisoned(step_all, states, batch, want):
  """A seed whose batch is bad is skipped alone; the state of the other is the same bit by bit."""
  bad = {**batch, 'tokens': batch['tokens'].copy()}
  bad['tokens'][1, 0, 0] = 10**6
  got, figures = step_all(states, bad)
  np.testing.assert_array_equal(figures.skipped.total, [0, 1])
  jax.tree.map(np.testing.assert_array_equal, seeds.take(got, 0), seeds.take(want, 0))
  params = (seeds.take(one, 1).params for one in (got, states))
  jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(directory, config, runs) of two seeds at once, stopped once on the way."""
  root = tmp_path_factory.mktemp('seeds')
  cfg = make_config(root / 'cache')
  lines = []

  def stop_after_three(line: str):
    lines.append(line)
    if line.startswith(f'seed={SEEDS[0]} step=3 '):
      os.kill(os.getpid(), signal.SIGTERM)

  runs, _ = seeds.run_training(cfg, SEEDS, root / 'arm', say=stop_after_three)
  assert runs[0].interrupted_by == 'SIGTERM' and runs[0].step == 4
  with pytest.raises(errors.InputError, match='cannot go on as'):
    seeds.run_training(cfg, (0, 3), root / 'arm', say=lines.append)
  runs, _ = seeds.run_training(cfg, SEEDS, root / 'arm', say=lines.append)
  assert 'resuming after step 4 of 6' in lines
  return root, cfg, runs


def test_losses_are_those_of_separate_runs(trained):
  root, cfg, runs = trained
  for one, found in zip(seeds.configs(cfg, SEEDS), runs):
    workdir = root / f'alone-{one.train.seed}'
    alone, _ = train_run.run_training(one, workdir, say=lambda line: None)
    own = root / 'arm' / str(one.train.seed)
    got = {m['step']: m['loss'] for m in metric_log.read_metrics(own)}
    want = {m['step']: m['loss'] for m in metric_log.read_metrics(workdir)}
    assert list(got) == list(want) == list(range(1, 7))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=2e-5)
    tiny.assert_trees_close(found.variables['params'], alone.variables['params'], 1e-2, 1e-3)
  assert (
    len({m['loss'] for s in SEEDS for m in metric_log.read_metrics(root / 'arm' / str(s))}) == 12
  )


def test_each_seed_has_a_workdir_of_its_own(trained):
  root, cfg, runs = trained
  assert not (root / 'arm' / 'together').exists()
  for one, found in zip(seeds.configs(cfg, SEEDS), runs):
    workdir = root / 'arm' / str(one.train.seed)
    assert sorted(p.name for p in (workdir / 'routing').glob('*')) == ['3.npz', '6.npz']
    loaded = trained_run.load(workdir)
    assert loaded.step == 6 and loaded.cfg.train.seed == one.train.seed
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, found.variables)


def test_saving_each_seed_goes_on_where_it_was_killed(trained):
  root, cfg, _ = trained
  workdir = root / 'killed'
  shutil.copytree(root / 'arm', workdir)
  shutil.rmtree(workdir / str(SEEDS[1]) / 'checkpoints')
  # As if all states had been saved together and one seed's own checkpoint had not come yet.
  fresh = root / 'again'
  seeds.run_training(cfg, SEEDS, fresh, say=lambda line: None)
  one = seeds.configs(cfg, SEEDS)[1]
  mesh, corpus = checks.prepare(one)
  with trained_run.reader(fresh / str(SEEDS[1])) as reader:
    state = reader.restore(train_state.abstract_state(one, mesh)).state
  seeds.save_one(one, workdir / str(SEEDS[1]), corpus, mesh, state)
  seeds.save_one(one, workdir / str(SEEDS[1]), corpus, mesh, state)  # a whole one stands
  assert trained_run.load(workdir / str(SEEDS[1])).step == 6


def test_a_trained_arm_is_not_trained_again(trained):
  """As if the command had been killed after training and before evaluation."""
  root, cfg, runs = trained
  lines = []
  again, _ = seeds.run_training(cfg, SEEDS, root / 'arm', say=lines.append)
  assert not lines and again[0].step == 6 and not again[0].interrupted_by
  for one, other in zip(runs, again):
    jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
  assert len(metric_log.read_metrics(root / 'arm' / str(SEEDS[0]))) == 6


def test_a_kill_while_the_common_steps_are_deleted_costs_nothing(trained, monkeypatch):
  root, cfg, _ = trained
  workdir = shutil.copytree(root / 'arm', root / 'half_deleted')

  def killed(path):
    half = path / 'checkpoints' / '6' / 'state' / 'x'
    half.parent.mkdir(parents=True)
    half.touch()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(seeds.shutil, 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt):
      seeds.run_training(cfg, SEEDS, workdir)
  again, _ = seeds.run_training(cfg, SEEDS, workdir)
  assert again[0].step == 6
  assert sorted(p.name for p in workdir.iterdir()) == ['0', '3']


def test_all_workdirs_are_locked_until_all_is_written(trained, monkeypatch):
  root, cfg, _ = trained
  workdir, looked = root / 'arm', []

  def looking(name):
    plain = getattr(seeds, name)

    def call(*args, **kwargs):
      for place in ('together', *map(str, SEEDS)):
        with pytest.raises(errors.InputError, match='being written by another process'):
          with atomic_files.lock(workdir / place):
            pass
      looked.append(name)
      return plain(*args, **kwargs)

    monkeypatch.setattr(seeds, name, call)

  looking('_fit')
  looking('save_one')
  seeds.run_training(cfg, SEEDS, workdir)
  assert looked == ['_fit', 'save_one', 'save_one']


def test_a_seed_that_is_being_trained_elsewhere_is_refused(trained):
  root, cfg, _ = trained
  before = sorted(root.glob('arm/**/*'))
  with atomic_files.lock(root / 'arm' / str(SEEDS[1])):
    with pytest.raises(errors.InputError, match='being written by another process'):
      seeds.run_training(cfg, SEEDS, root / 'arm')
  assert sorted(root.glob('arm/**/*')) == before


def test_a_trained_arm_is_not_taken_for_one_of_another_text(trained, monkeypatch):
  root, cfg, _ = trained
  records = [root / 'arm' / str(seed) / 'config.json' for seed in SEEDS]
  before = [path.read_bytes() for path in records]
  prepare = checks.prepare

  def another_text(one):
    mesh, corpus = prepare(one)
    return mesh, dataclasses.replace(corpus, fingerprint='another')

  monkeypatch.setattr(checks, 'prepare', another_text)
  with pytest.raises(errors.InputError, match='the corpus has changed'):
    seeds.run_training(cfg, SEEDS, root / 'arm')
  assert [path.read_bytes() for path in records] == before


@pytest.mark.parametrize(
  'wrong, message',
  [
    ({'seeds': (1, 1)}, 'different numbers'),
    ({'cfg': {'init_from': 'elsewhere'}}, 'config.init_from'),
  ],
)
def test_refusals(tmp_path, wrong, message):
  cfg = make_config(tmp_path, **wrong.get('cfg', {}))
  with pytest.raises(errors.InputError, match=message):
    seeds.run_training(cfg, wrong.get('seeds', SEEDS), tmp_path / 'arm')
  assert not (tmp_path / 'arm').exists()


def test_more_than_one_device_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:2]))
  with pytest.raises(errors.InputError, match='together=1'):
    seeds.run_training(make_config(tmp_path), SEEDS, tmp_path / 'arm')
  assert not (tmp_path / 'arm').exists()


def test_each_seed_reads_the_corpus_of_a_run_of_its_own(tmp_path, monkeypatch):
  asked = []

  def prepare(one):
    asked.append(one.train.seed)
    return None, None

  def enough(*unused, **more):
    raise errors.InputError('enough')

  monkeypatch.setattr(checks, 'prepare', prepare)
  monkeypatch.setattr(seeds.run_record, 'check_workdir', enough)
  with pytest.raises(errors.InputError, match='enough'):
    seeds.run_training(make_config(tmp_path), SEEDS, tmp_path / 'arm')
  assert asked == list(SEEDS)


def test_another_spelling_of_a_path_is_the_same_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tokenizer.json').touch()
  (tmp_path / 'elsewhere').mkdir()
  first = make_config(tmp_path / 'cache', data__tokenizer='tokenizer.json')
  for one in seeds.configs(first, SEEDS):
    run_record.write(tmp_path / 'arm' / str(one.train.seed), one, argv=[], data_fingerprint='')
  asked = []

  def prepare(one):
    asked.append(one.data.tokenizer)
    return None, None

  def enough(*unused):
    raise errors.InputError('enough')

  monkeypatch.setattr(checks, 'prepare', prepare)
  monkeypatch.setattr(seeds.atomic_files, 'lock', enough)
  monkeypatch.chdir(tmp_path / 'elsewhere')
  cfg = make_config(tmp_path / 'cache', data__tokenizer='../tokenizer.json')
  with pytest.raises(errors.InputError, match='enough'):
    seeds.run_training(cfg, SEEDS, tmp_path / 'arm')
  assert asked == [str(tmp_path / 'tokenizer.json')] * 2
  other = make_config(tmp_path / 'cache', data__tokenizer='tokenizer.json.old')
  with pytest.raises(errors.InputError, match='holds a run of another config'):
    seeds.run_training(other, SEEDS, tmp_path / 'arm')
