"""A whole run in one process: what it writes, how it resumes, and what it refuses."""

import dataclasses
import json
import math
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax import atomic_files, errors
from moe_jax.balance import routing_figures
from moe_jax.config import batch_sizes, parse, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import packing, pipeline
from moe_jax.devices import partitioning
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import model_variables
from moe_jax.runs import (
  final_report,
  metric_log,
  nonfinite_dump,
  router_tables,
  train_run,
  trained_run,
)
from moe_jax.training import evaluate, loop, train_state

MAKE_MESH = partitioning.make_mesh
OVERRIDES = {
  'optim.warmup_steps': 0,
  'train.num_steps': 12,
  'train.log_every': 1,
  'train.eval_every': 5,
  'train.routing_every': 4,
  'model.moe.num_virtual_devices': 4,
  'model.moe.expert_bias.update_rule': 'sign',
  'checkpoint.save_every': 4,
  'data.synthetic_documents': 120,
  'data.heldout_fraction': 0.2,
  'mesh.data': 2,
}


def make_config(cache: pathlib.Path, variant: str = '', **overrides) -> schema.Config:
  page = smoke.get_config(variant)
  page.update_from_flattened_dict(OVERRIDES | {'data.cache_dir': str(cache)})
  page.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return parse.from_dict(page.to_dict())


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  """Enough to see sharding at work; all eight would compile and compute four times as long."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:2]))
    yield


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def finished(cache, tmp_path_factory):
  """(workdir, lines said) of a run that went to its end, with the report."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  lines = []
  trained, corpus = train_run.run_training(make_config(cache), workdir, say=lines.append)
  final_report.finish(trained, corpus, workdir, lines.append)
  return workdir, lines


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run that a test may damage."""
  return pathlib.Path(shutil.copytree(finished[0], tmp_path / 'run'))


def test_a_run_writes_what_it_promises(finished):
  workdir, lines = finished
  assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'8', '12'}  # keep_last = 2
  for name in ('config.json', 'tokenizer.json', 'evaluation.json', 'plots/loss.png'):
    assert (workdir / name).stat().st_size > 0
  assert (workdir / 'plots/expert_load.png').read_bytes().startswith(b'\x89PNG')
  assert list((workdir / 'tensorboard').iterdir())
  points = metric_log.read_metrics(workdir)
  assert [p['step'] for p in points] == list(range(1, 13))
  assert all(set(p) == set(metric_log.KEYS) for p in points)
  assert points[-1]['loss'] < points[0]['loss'] - 0.5  # 5.6 at the start
  stalls = [p['save_stall_share'] for p in points]  # saves follow the lines of steps 4, 8 and 12
  assert stalls[:4] == [0] * 4 and all(0 < share < 1 for share in stalls[4:])
  assert sum(line.startswith('step=') and 'max_vio=' in line for line in lines) == 12
  assert sum('heldout_bits_per_byte=' in line for line in lines) == 2  # steps 5 and 10
  assert 'grouped_matmul=blocks' in lines[0]
  said = '\n'.join(lines)
  assert 'gzip -9' in said and 'xz -9' in said and 'max_vio_global=' in said
  record = json.loads((workdir / 'config.json').read_text())
  assert record['config']['train']['num_steps'] == 12


class Untouchable:
  """Stands for what the host must not look at: any look would wait for the device.

  But for the count of skipped steps, which is read when the loop has waited for its step anyway.
  """

  skipped = types.SimpleNamespace(in_row=np.int32(0))

  def __getattr__(self, name):
    raise AssertionError(f'{name} was read between two log lines')


def test_a_run_reads_nothing_from_the_device_between_log_lines(cache, tmp_path, monkeypatch):
  overrides = {'train__log_every': 5, 'train__eval_every': 0, 'train__routing_every': 0}
  cfg = make_config(cache, checkpoint__save_every=12, **overrides)
  steps, hidden = loop.steps, []

  def guarded(*args, **kwargs):
    for done in steps(*args, **kwargs):
      if done.step in (5, 10, 12):
        yield done
      else:
        hidden.append(done.step)
        yield loop.StepReport(done.step, Untouchable(), Untouchable())

  monkeypatch.setattr(loop, 'steps', guarded)
  said = []
  trained, _ = train_run.run_training(cfg, tmp_path / 'run', say=said.append, profile_steps=(7, 8))
  assert trained.step == 12 and len(hidden) == 9
  shares = json.loads((tmp_path / 'run/profile/shares.json').read_text())
  assert sum(shares.values()) == pytest.approx(1) and shares['attention'] > 0
  assert sum(line.startswith('profile of steps 7 to 8') for line in said) == 1
  points = metric_log.read_metrics(tmp_path / 'run')
  assert [p['step'] for p in points] == [5, 10, 12]
  assert all(p['save_stall_share'] == 0 for p in points)  # the only save came last


def test_the_last_step_can_be_profiled(cache, tmp_path):
  cfg = make_config(cache)
  last = cfg.train.num_steps
  assert train_run._profile_window(cfg, tmp_path, (1, last), print).last == last
  with pytest.raises(errors.InputError, match='must end by'):
    train_run._profile_window(cfg, tmp_path, (1, last + 1), print)


@pytest.mark.parametrize('steps', [(0, 1), (5, 4), (12, 13)])
def test_steps_that_cannot_be_profiled_are_refused(cache, tmp_path, steps):
  with pytest.raises(errors.InputError, match='profile_steps'):
    train_run.run_training(make_config(cache), tmp_path / 'run', profile_steps=steps)
  assert not (tmp_path / 'run').exists()


def test_routing_figures_of_the_run_are_kept_as_arrays(finished):
  workdir, _ = finished
  history = routing_figures.read_history(workdir / 'routing')
  assert [step for step, _ in history] == [4, 8, 12]
  loaded = trained_run.load(workdir)
  moe = loaded.cfg.model.moe
  bias = np.asarray(model_variables.moe_state(loaded.variables['router_state'])['expert_bias'])
  for step, figures in history:
    assert set(routing_figures.KEYS) <= set(figures)
    load, tokens = figures['load'], figures['num_tokens']
    np.testing.assert_array_equal(load.sum(1), tokens * moe.num_experts_per_tok)
    # At most one step of u per optimizer step; the loads of random text are never quite equal.
    assert (figures['bias_norm'] > 0).all()
    assert (figures['bias_norm'] <= step * 1e-3 * math.sqrt(moe.num_experts) * 1.001).all()
  np.testing.assert_allclose(history[-1][1]['bias_norm'], np.linalg.norm(bias, axis=-1), rtol=1e-5)
  heldout = routing_figures.read(workdir / 'routing' / 'heldout.npz')
  record = json.loads((workdir / 'evaluation.json').read_text())
  assert record['max_vio_per_layer'] == heldout['max_vio'].tolist()
  for name in ('routing.png', 'expert_load.png', 'expert_similarity.png', 'tokens_sent.png'):
    assert (workdir / 'plots' / name).read_bytes().startswith(b'\x89PNG')


def test_routing_figures_of_redone_steps_are_written_anew(cache, workdir):
  shutil.rmtree(workdir / 'checkpoints/12')
  kept = (workdir / 'routing/8.npz').read_bytes()
  before = routing_figures.read(workdir / 'routing/12.npz')
  (workdir / 'routing/12.npz').write_bytes(b'of a run that was lost')
  (workdir / 'routing/16.npz').write_bytes(b'of a run that was lost')
  train_run.run_training(make_config(cache), workdir, say=lambda line: None)
  assert (workdir / 'routing/8.npz').read_bytes() == kept
  after = routing_figures.read(workdir / 'routing/12.npz')
  assert not (workdir / 'routing/16.npz').exists()
  for key in before:
    np.testing.assert_array_equal(before[key], after[key], err_msg=key)


def test_balanced_hash_tables_follow_the_training_text(cache):
  cfg = make_config(
    cache,
    model__moe__router='hash',
    model__moe__options__hash_table='balanced',
    model__moe__expert_bias__update_rule='none',
  )
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed)
  mesh = partitioning.make_mesh(cfg.mesh)
  start = train_state.init_state(cfg, mesh)
  state = router_tables.with_tables(cfg, start, corpus)
  tables = np.asarray(model_variables.moe_state(state.router_state)['table'])
  ids = np.asarray(corpus.train[0].tokens)
  for table in tables:
    load = np.bincount(table[ids].ravel(), minlength=cfg.model.moe.num_experts)
    assert load.max() < 1.05 * load.mean()  # a random table: 1.5 and more on bytes
  assert (tables[0] != tables[1]).any()
  jax.tree.map(np.testing.assert_array_equal, state.params, start.params)


def test_the_same_command_again_trains_no_step_twice(cache, workdir):
  before = (workdir / 'metrics.jsonl').read_bytes()
  lines = []
  trained, _ = train_run.run_training(make_config(cache), workdir, say=lines.append)
  assert lines[1:] == ['resuming after step 12 of 12'] and trained.step == 12
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_changed_config_is_refused_and_allowed_on_request(cache, workdir):
  size = make_config(cache).train.batch_size
  # A ramp of the same size, for which nothing is compiled anew.
  changed = make_config(cache, train__num_steps=14, train__batch_ramp=((1, size),))
  with pytest.raises(errors.InputError, match=r'train\.num_steps: 12 -> 14.*allow_config_change'):
    train_run.run_training(changed, workdir)
  lines = []
  trained, _ = train_run.run_training(changed, workdir, allow_config_change=True, say=lines.append)
  assert trained.step == 14 and 'config changed: train.num_steps: 12 -> 14' in lines
  # Rows are counted on from the change, and the next checkpoint knows.
  meta = trained_run.read_meta(workdir)
  assert meta['stream'] == {'step': 12, 'row': 12 * size}
  assert train_run._stream_start(meta, 14, changed) == (12, 12 * size)
  assert train_run._stream_start(meta, 14, make_config(cache)) == (14, 14 * size)
  halved = make_config(cache, train__batch_size=size // 2)
  assert train_run._stream_start(meta | {'stream': {}}, 14, halved) == (14, 14 * size)


def test_a_changed_corpus_is_refused(cache, tmp_path):
  (tmp_path / 'a.txt').write_text('x = 1\n' * 300000)
  cfg = make_config(
    cache, data__source='text', data__path=str(tmp_path / 'a.txt'), train__sample_prompt=''
  )  # and the steps of `finished`, whose program is compiled
  train_run.run_training(cfg, tmp_path / 'run', say=lambda line: None)
  (tmp_path / 'a.txt').write_text('y = 2\n' * 300000)
  with pytest.raises(errors.InputError, match='corpus has changed since the checkpoint of step 12'):
    train_run.run_training(cfg, tmp_path / 'run')


def test_heldout_figures_follow_from_true_counts(finished, cache):
  loaded = trained_run.load(finished[0])
  corpus = trained_run.heldout_corpus(loaded, finished[0], warn=pytest.fail)
  figures = evaluate.evaluate(loaded.cfg, loaded.variables, corpus, loaded.mesh)
  heldout = corpus.heldout
  targets = heldout.num_tokens - heldout.num_documents  # every token but each document's first
  bits = figures.loss * targets / math.log(2)
  assert figures.bits_per_byte == pytest.approx(bits / len(corpus.heldout_bytes()), rel=1e-9)
  # Sum of loads = tokens x K: each row feeds all of its tokens but the one that it only predicts.
  length = loaded.cfg.model.max_seq_len
  rows = packing.Packing(heldout, np.arange(heldout.num_documents), length)
  fed = sum(int((rows[i]['segment_ids'] > 0).sum()) for i in range(len(rows)))
  expected = [fed * loaded.cfg.model.moe.num_experts_per_tok] * loaded.cfg.model.num_moe_layers
  assert figures.load.sum(axis=1).tolist() == expected
  record = json.loads((finished[0] / 'evaluation.json').read_text())
  assert {k: v for k, v in record.items() if k != 'compressors_bits_per_byte'} == json.loads(
    json.dumps(figures.as_dict(12))
  )


def test_evaluation_does_not_depend_on_the_batch_size(finished):
  loaded = trained_run.load(finished[0])
  corpus = trained_run.heldout_corpus(loaded, finished[0], warn=pytest.fail)
  whole = evaluate.evaluate(loaded.cfg, loaded.variables, corpus, loaded.mesh)
  bigger = dataclasses.replace(loaded.cfg.train, batch_size=24)
  cfg = dataclasses.replace(loaded.cfg, train=bigger)
  other = evaluate.evaluate(cfg, loaded.variables, corpus, loaded.mesh)
  assert other.loss == pytest.approx(whole.loss, rel=1e-5)  # float32 sums in another order
  assert abs(other.load - whole.load).sum() <= 4  # a rounded score may move a tie


def test_loading_an_older_step(finished):
  assert trained_run.load(finished[0], step=8).step == 8
  with pytest.raises(errors.InputError, match=r'9.*8.*12'):
    trained_run.load(finished[0], step=9)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(cache, workdir, caplog):
  shutil.rmtree(workdir / 'checkpoints/12/state')
  assert trained_run.load(workdir).step == 8
  assert 'step 12' in caplog.text or '12' in caplog.text
  lines = []
  trained, _ = train_run.run_training(make_config(cache), workdir, say=lines.append)
  assert 'resuming after step 8 of 12' in lines and trained.step == 12
  losses = [p['loss'] for p in metric_log.read_metrics(workdir)]
  assert len(losses) == 12


def test_resuming_repeats_the_losses_bit_by_bit(cache, finished, workdir):
  shutil.rmtree(workdir / 'checkpoints/12')
  train_run.run_training(make_config(cache), workdir, say=lambda line: None)
  want = [(p['step'], p['loss'], p['grad_norm']) for p in metric_log.read_metrics(finished[0])]
  assert [(p['step'], p['loss'], p['grad_norm']) for p in metric_log.read_metrics(workdir)] == want


def test_another_tokenizer_is_refused(workdir):
  text = (workdir / 'tokenizer.json').read_text()
  (workdir / 'tokenizer.json').write_text(text.replace('"h":', '"h\\u0000":', 1))
  with pytest.raises(errors.InputError, match='is not the tokenizer'):
    trained_run.load(workdir)
  (workdir / 'tokenizer.json').unlink()
  with pytest.raises(errors.InputError, match=r'has lost its tokenizer\.json'):
    trained_run.load(workdir)


def test_a_lost_record_does_not_hide_a_changed_config(cache, workdir):
  (workdir / 'config.json').unlink()
  with pytest.raises(errors.InputError, match=r'another config: optim\.peak_lr: 0\.01 -> 0\.5'):
    train_run.run_training(make_config(cache, optim__peak_lr=0.5), workdir)


def test_a_checkpoint_never_continues_under_another_tokenizer(cache, workdir):
  before = (workdir / 'tokenizer.json').read_bytes()
  other = make_config(cache, data__tokenizer='bpe', train__num_steps=14)
  with pytest.raises(errors.InputError, match='trained with another tokenizer.*tokenizer.json'):
    train_run.run_training(other, workdir, allow_config_change=True)
  assert (workdir / 'tokenizer.json').read_bytes() == before


def test_a_second_writer_is_refused(cache, workdir):
  with (
    atomic_files.lock(workdir),
    pytest.raises(errors.InputError, match='is being written by another process'),
  ):
    train_run.run_training(make_config(cache), workdir)


def test_a_run_can_be_used_on_any_number_of_devices(finished):
  workdir = finished[0]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda mesh: MAKE_MESH(mesh, jax.devices()[:3]))
    loaded = trained_run.load(workdir)
    corpus = trained_run.heldout_corpus(loaded, workdir, warn=pytest.fail)
    assert evaluate.evaluate(loaded.cfg, loaded.variables, corpus, loaded.mesh).loss > 0


def test_a_workdir_without_checkpoints_says_what_to_do(tmp_path):
  with pytest.raises(errors.InputError, match='holds no checkpoints; train first'):
    trained_run.load(tmp_path / 'nothing')
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(errors.InputError, match='holds no finished checkpoint yet'):
    trained_run.load(tmp_path)


def test_sampling_from_a_run_is_reproducible(finished):
  loaded = trained_run.load(finished[0])

  def draw(seed):
    return final_report.sample(loaded, 'def ', 16, sampling_lib.Sampling(seed=seed))[0]

  assert draw(0) == draw(0) != draw(1)


@pytest.mark.slow  # one more program
def test_a_dense_run_has_no_expert_figures(cache, tmp_path):
  cfg = make_config(cache, 'dense', train__num_steps=2, train__sample_prompt='')
  lines = []
  trained, corpus = train_run.run_training(cfg, tmp_path, say=lines.append)
  figures = final_report.finish(trained, corpus, tmp_path, lines.append)
  assert figures.max_vio is None and figures.max_vio_per_layer == []
  assert metric_log.read_metrics(tmp_path)[-1]['max_vio'] is None
  assert not (tmp_path / 'plots/expert_load.png').exists()


@pytest.mark.slow  # three more programs
def test_a_batch_ramp_and_micro_batches_run_through(cache, tmp_path):
  cfg = make_config(
    cache, train__num_steps=3, train__batch_ramp=((2, 8),), train__batch_size=16,
    train__micro_batch_size=8,
  )  # fmt: skip
  train_run.run_training(cfg, tmp_path, say=lambda line: None)
  assert len(metric_log.read_metrics(tmp_path)) == 3


@pytest.mark.slow  # `test_nonfinite_guard` tries the rule itself
def test_divergence_is_one_clear_error_and_saves_nothing(cache, tmp_path):
  cfg = make_config(
    cache, optim__peak_lr=1e12, optim__clip_norm=0.0, train__num_steps=8,
    checkpoint__save_every=100,
  )  # fmt: skip
  with pytest.raises(errors.InputError, match=r'diverged with config\.optim\.peak_lr=10{12}\.0'):
    train_run.run_training(cfg, tmp_path, say=lambda line: None)
  assert not [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  lines = metric_log.read_metrics(tmp_path)
  bad = next(line['step'] for line in lines if line['skipped_steps'])
  assert [line['skipped_steps'] for line in lines] == [0] * (bad - 1) + [1, 2, 3, 4]
  dump = nonfinite_dump.read(tmp_path, None)
  assert dump.figures['step'] == bad and dump.figures['last_step'] == bad + 3
  assert dump.figures['loss'] is None and dump.figures['rows'] == [8 * (bad - 1), 8 * bad - 1]
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed)
  (want,) = pipeline.train_batches(
    corpus, seed=cfg.train.seed, max_seq_len=cfg.model.max_seq_len, num_steps=bad,
    start_step=bad - 1, batch_sizes=batch_sizes.BatchSizes(8),
  )  # fmt: skip
  np.testing.assert_array_equal(dump.batch['tokens'], want['tokens'])


@pytest.mark.parametrize(
  'overrides, message',
  [
    ({'train__batch_size': 7}, 'batch_size=7 must be divisible by 2, .*data=2'),
    ({'train__seed': 2**32}, r'train\.seed=4294967296 must be below 2\^32'),
    ({'mesh__data': 3}, r'config\.mesh\.data=3: .* must equal the number of devices \(2\)'),
    ({'train__batch_size': 4096}, 'batch_size'),
    ({'train__sample_prompt': 'x' * 200}, 'together more than model.max_seq_len=128'),
    ({'model__vocab_size': 100}, 'vocab_size=100'),
    ({'data__source': 'text', 'data__path': '/nonexistent/*.txt'}, 'nonexistent'),
    (
      {'model__moe__num_experts': 10**6, 'train__batch_size': 2048},
      r'micro_batch_size=0 .* int32 sort key of 1000000 experts .* at most \d+',
    ),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(cache, tmp_path, overrides, message):
  with pytest.raises(errors.InputError, match=message):
    train_run.run_training(make_config(cache, **overrides), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_weights_that_cannot_be_read_leave_no_workdir_behind(cache, workdir, tmp_path):
  for path in (workdir / 'checkpoints').glob('*/state/**/d/*'):
    path.write_bytes(b'')
  with pytest.raises(errors.InputError, match='is whole'):
    train_run.run_training(make_config(cache, init_from=str(workdir)), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
