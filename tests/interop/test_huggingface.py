import itertools
import json

import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import stream_reader, stream_writer
from moe_jax.config import parse
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface, source
from moe_jax.runs import trained_run
from moe_jax.training import train_state
from tests import tiny
from tests.interop import checkpoints, conversions


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """(directory, workdir) of an imported V2."""
  root = tmp_path_factory.mktemp('imported')
  hf = checkpoints.config('deepseek_v2')
  original = checkpoints.write(root / 'in', hf, checkpoints.tensors(hf))
  settings = {'eos_token_id': [1, 7, 9]}
  (original / 'generation_config.json').write_text(json.dumps(settings))
  huggingface.import_checkpoint(original, tiny.values(), root / 'run')
  return original, root / 'run'


def test_the_workdir_is_a_run(imported):
  original, workdir = imported
  run = trained_run.load(workdir)
  assert run.tokenizer.end_ids == (1, 7, 9)
  assert huggingface.opened(original, tiny.values(), workdir)[1].end_ids == (1, 7, 9)
  assert run.step == 0 and run.tokenizer.bos_id == 0 and run.tokenizer.eos_id == 1
  data = run.cfg.data
  assert (data.bos_token, data.eos_token) == ('<s>', '</s>')
  assert data.tokenizer == str(workdir / 'tokenizer.json')
  assert json.loads((workdir / 'config.json').read_text())['data_fingerprint'] == 'imported'
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), source.abstract_leaves(run.cfg.model))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(run.variables)) == shapes
  assert {p.name for p in workdir.iterdir()} == {
    *('config.json', 'tokenizer.json', 'hf', 'checkpoints')
  }


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
  target = tmp_path / 'exported'
  with (
    pytest.raises(errors.InputError, match=r'no room .*exported: 5,000 bytes are needed and'),
    huggingface.staged(target, '--to_hf', 5000) as staging,
    (staging / 'config.json').open('w'),
    open('/dev/full', 'w') as full,
  ):
    full.write('x')
  assert not list(tmp_path.iterdir())


OWN = [
  {'moe__num_experts': 0, 'moe__num_shared_experts': 0, 'num_dense_layers': 0},
  {},
  {'attention__kind': 'mla', 'attention__rope__layout': 'interleaved'},
  {
    'attention__kind': 'mla',
    'moe__score_func': 'sigmoid',
    'moe__expert_bias__update_rule': 'sign',
    'moe__num_expert_groups': 4,
    'moe__num_limited_groups': 2,
    'moe__group_score': 'top2_sum',
    'moe__balance__expert_level__weight': 0.0,
    'num_mtp_layers': 2,
  },
]


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('changes', OWN)
def test_models_of_our_own_are_saved_and_loaded(tmp_path, changes, fused):
  changes = {f'model__{key}': value for key, value in changes.items()}
  cfg = tiny.make(**changes, paper__mlp_dim=0.0)
  variables = {'params': tiny.params(cfg.model), 'router_state': tiny.router_state(cfg.model)}
  huggingface.save(cfg, variables, tmp_path / 'out', fused_experts=fused, shard_bytes=10_000)
  got, loaded = huggingface.load_variables(tmp_path / 'out', parse.to_dict(cfg))
  assert got == cfg
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_an_export_of_a_training_run(tmp_path):
  """A checkpoint with the state of an optimizer, as a run writes it."""
  cfg = tiny.make(checkpoint__save_every=1)
  mesh = partitioning.make_mesh(cfg.mesh)
  state = train_state.init_state(cfg, mesh)
  tokenizer = tokenizer_lib.byte_tokenizer(cfg.data.bos_token, cfg.data.eos_token)
  meta = {'config': parse.to_dict(cfg), 'tokenizer': '', 'data_fingerprint': ''}
  with checkpointer_lib.Checkpointer(tmp_path / 'run/checkpoints', cfg.checkpoint) as checkpointer:
    checkpointer.save(1, state, meta, force=True)
  tokenizer.save(tmp_path / 'run/tokenizer.json')
  conversions.export(tmp_path / 'run', tmp_path / 'out')
  got, loaded = huggingface.load_variables(tmp_path / 'out', parse.to_dict(cfg))
  assert got.model == cfg.model
  jax.tree.map(np.testing.assert_array_equal, loaded['params'], dict(state.params))


def test_a_failed_conversion_leaves_nothing(imported, tmp_path, monkeypatch):
  original, workdir = imported
  for kind, method, convert_ in (
    (stream_writer.Writer, 'write', lambda: conversions.import_(original, tmp_path / 'run')),
    (stream_reader.Reader, 'read', lambda: conversions.export(workdir, tmp_path / 'out')),
  ):
    monkeypatch.setattr(kind, method, interrupted(getattr(kind, method), at=20))
    with pytest.raises(KeyboardInterrupt):
      convert_()
    assert not any(tmp_path.iterdir())


def interrupted(function, at: int):
  """`function`, but its call number `at` is Ctrl-C."""
  calls = itertools.count(1)

  def call(*arguments):
    if next(calls) == at:
      raise KeyboardInterrupt
    return function(*arguments)

  return call


def test_what_a_killed_import_left_is_cleared(imported, tmp_path):
  left = tmp_path / '.run.converting/checkpoints/0.orbax-checkpoint-tmp'
  left.mkdir(parents=True)
  (tmp_path / '.run.converting/config.json').write_text('half')
  (tmp_path / 'run').mkdir()  # an empty workdir is well
  conversions.import_(imported[0], tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == ['run']
  assert trained_run.read_meta(tmp_path / 'run')['step'] == 0
