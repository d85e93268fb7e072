"""The command, there and back: bitwise equal files, whole workdirs, nothing after a refusal."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from configs import base
from experiments import convert
from moe_jax import errors
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import stream_reader, stream_writer
from moe_jax.config import parse
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface, source
from moe_jax.runs import trained_run
from moe_jax.training import train_state
from tests import in_process, tiny
from tests.interop import checkpoints

BLOCK = {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [5, 5]}


def import_(directory, workdir, *flags):
  in_process.run(convert, f'--from_hf={directory}', f'--workdir={workdir}', *flags)


def export(workdir, directory, *flags):
  in_process.run(convert, f'--to_hf={directory}', f'--workdir={workdir}', *flags)


def contents(directory) -> dict[str, bytes]:
  """The small files."""
  paths = [p for p in directory.iterdir() if 'safetensors' not in p.name]
  return {path.name: path.read_bytes() for path in paths}


def read_and_converted(directory, workdir) -> tuple[trained_run.Run, trained_run.Run]:
  """A downloaded checkpoint read directly, and its import read from the workdir."""
  read = huggingface.load(directory, base.get_config().to_dict(), say=lambda line: None)
  return read, trained_run.load(workdir)


def same_runs(read: trained_run.Run, converted: trained_run.Run):
  """Equal bit by bit, on the same devices, with the same tokenizer and config."""
  home = {'tokenizer': ''}
  data = [dataclasses.replace(run.cfg.data, **home) for run in (read, converted)]
  assert dataclasses.replace(read.cfg, data=data[0]) == dataclasses.replace(
    converted.cfg, data=data[1]
  )
  assert read.mesh == converted.mesh and read.mesh.size > 1
  assert trained_run.digest(read.tokenizer) == trained_run.digest(converted.tokenizer)
  assert (read.step, read.data_fingerprint) == (converted.step, converted.data_fingerprint)
  leaves, others = source.by_name(read.variables), source.by_name(converted.variables)
  assert list(leaves) == list(others)
  for name, leaf in leaves.items():
    assert (leaf.dtype, leaf.sharding) == (others[name].dtype, others[name].sharding), name
    np.testing.assert_array_equal(bits(leaf), bits(others[name]), err_msg=name)


def bits(array) -> np.ndarray:
  array = np.asarray(array)
  return array.view(f'u{array.itemsize}')


CASES = [
  ('llama', {}, {}, 1),
  ('llama', {'tie_word_embeddings': True}, {}, 1),
  ('llama', {'torch_dtype': 'float32'}, {'dtype': np.float32}, 2),
  ('deepseek', {}, {'dtype': np.float16}, 1),
  ('deepseek', {}, {'fused': True}, 1),
  ('deepseek_v2_lite', {}, {}, 3),
  ('deepseek_v2', {}, {}, 1),
  ('deepseek_v3', {}, {}, 4),
  ('deepseek_v3', {}, {'mtp': False}, 1),
  ('deepseek_v3', {'num_nextn_predict_layers': 0}, {'fused': True}, 1),
]


@pytest.mark.parametrize('family, changes, options, num_shards', CASES)
def test_there_and_back(tmp_path, capsys, family, changes, options, num_shards):
  """An export gives back names, dtypes, bytes and small files; a streamed import equals `load`."""
  hf = checkpoints.config(family, **changes)
  weights = checkpoints.tensors(hf, **options)
  original = checkpoints.write(tmp_path / 'in', hf, weights, num_shards=num_shards)
  import_(original, tmp_path / 'run')
  export(tmp_path / 'run', tmp_path / 'out')
  assert checkpoints.read(tmp_path / 'out') == checkpoints.read(original)
  assert contents(tmp_path / 'out') == contents(original)
  said = capsys.readouterr().out
  assert f'{len(weights)} tensors' in said and 'peak host memory' in said
  assert ('without multi-token prediction' in said) == (options == {'mtp': False})

  cfg, variables = huggingface.load_variables(original, base.get_config().to_dict())
  with stream_reader.Reader(tmp_path / 'run/checkpoints') as reader:
    assert parse.from_dict(reader.meta['config']).model == cfg.model
    assert (reader.step, reader.meta['data_fingerprint']) == (0, 'imported')
    for name, leaf in source.by_name(variables).items():
      np.testing.assert_array_equal(reader.read(name), leaf)
  read, converted = read_and_converted(original, tmp_path / 'run')
  assert read.cfg.model == cfg.model and 'tokenizer.json' in read.cfg.data.tokenizer
  same_runs(read, converted)
  wide = options.get('dtype') in (np.float32, np.float16)
  assert cfg.model.param_dtype == cfg.model.dtype == ('float32' if wide else 'bfloat16')


def test_float8(tmp_path, capsys):
  """Weights arrive times the scales of their blocks, and leave as bfloat16 without them."""
  hf = checkpoints.config('deepseek_v3', quantization_config=BLOCK)
  weights = checkpoints.quantise(checkpoints.tensors(hf), block=5)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  import_(original, tmp_path / 'run')
  export(tmp_path / 'run', tmp_path / 'out')
  assert 'exported without quantisation' in capsys.readouterr().out
  got = checkpoints.read(tmp_path / 'out')
  same_runs(*read_and_converted(original, tmp_path / 'run'))
  want = {}
  for name, weight in weights.items():
    scale = weights.get(f'{name}_scale_inv')
    if scale is not None:
      whole = np.kron(scale, np.ones((5, 5), np.float32))[: weight.shape[0], : weight.shape[1]]
      weight = (weight.astype(np.float32) * whole).astype(ml_dtypes.bfloat16)
    if not name.endswith('_scale_inv'):
      want[name] = weight.tobytes()
  assert {name: item[2] for name, item in got.items()} == want
  made = json.loads((tmp_path / 'out/config.json').read_text())
  assert made == {k: v for k, v in hf.items() if k != 'quantization_config'}


def test_dtypes(tmp_path):
  """--param_dtype and --dtype; biases of experts stay float32."""
  hf = checkpoints.config('deepseek_v3')
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  import_(original, tmp_path / 'run', '--param_dtype=float32')
  assert trained_run.read_config(tmp_path / 'run').model.param_dtype == 'float32'
  export(tmp_path / 'run', tmp_path / 'same')
  assert checkpoints.read(tmp_path / 'same') == checkpoints.read(original)
  export(tmp_path / 'run', tmp_path / 'wide', '--dtype=float32', '--step=0')
  got, want = checkpoints.read(tmp_path / 'wide'), checkpoints.read(original)
  assert {item[0] for item in got.values()} == {'F32'}
  for name, (dtype, _, data) in want.items():
    numbers = np.frombuffer(data, ml_dtypes.bfloat16 if dtype == 'BF16' else np.float32)
    np.testing.assert_array_equal(np.frombuffer(got[name][2], np.float32), numbers)
  assert json.loads((tmp_path / 'wide/config.json').read_text())['torch_dtype'] == 'float32'


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """(directory, workdir) of an imported V2."""
  root = tmp_path_factory.mktemp('imported')
  hf = checkpoints.config('deepseek_v2')
  original = checkpoints.write(root / 'in', hf, checkpoints.tensors(hf))
  huggingface.import_checkpoint(original, tiny.values(), root / 'run')
  return original, root / 'run'


def test_the_workdir_is_a_run(imported):
  original, workdir = imported
  run = trained_run.load(workdir)
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


def rewritten(imported, tmp_path, cfg, **arrays):
  """A copy of the imported workdir with another config and some other leaves."""
  workdir = tmp_path / 'changed'
  shutil.copytree(imported[1], workdir)
  with stream_reader.Reader(workdir / 'checkpoints', 0) as reader:
    meta = reader.meta | {'config': parse.to_dict(cfg)}
    leaves = source.abstract_leaves(cfg.model)
    with stream_writer.Writer(workdir / 'checkpoints', 5, leaves, meta) as writer:
      for name in source.by_name(leaves):
        writer.write(name, (), arrays.get(name, reader.read(name)))
  return workdir


@pytest.mark.parametrize('newer', [False, True])
def test_only_what_has_changed_is_changed_in_config_json(imported, tmp_path, newer):
  values = parse.to_dict(trained_run.read_config(imported[1]))
  values['model']['max_seq_len'] = 128
  values['model']['attention']['rope']['theta'] = 5000.0
  workdir = rewritten(imported, tmp_path, parse.from_dict(values))
  before = json.loads((imported[0] / 'config.json').read_text())
  if newer:
    rope = {k: v for k, v in checkpoints.YARN.items() if k != 'type'}
    del before['rope_scaling'], before['rope_theta']
    before['rope_parameters'] = rope | {'rope_type': 'yarn', 'rope_theta': 1e4}
    (workdir / 'hf/config.json').write_text(json.dumps(before))
  export(workdir, tmp_path / 'out')
  after = json.loads((tmp_path / 'out/config.json').read_text())
  different = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
  assert after['max_position_embeddings'] == 128 and after['rope_theta'] == 5000.0
  if newer:  # one spelling only, so that no reader sees two answers
    assert different == {
      *('max_position_embeddings', 'rope_theta', 'rope_scaling', 'rope_parameters')
    }
    assert 'rope_parameters' not in after
    assert after['rope_scaling'] == checkpoints.YARN | {'rope_type': 'yarn'}
  else:
    assert different == {'max_position_embeddings', 'rope_theta'}


def test_a_tied_head_that_was_trained_is_untied(tmp_path, capsys):
  hf = checkpoints.config('llama', tie_word_embeddings=True)
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  huggingface.import_checkpoint(original, tiny.values(), tmp_path / 'run')
  cfg = trained_run.read_config(tmp_path / 'run')
  head = np.full((checkpoints.D, checkpoints.V), 2.0, ml_dtypes.bfloat16)
  workdir = rewritten((original, tmp_path / 'run'), tmp_path, cfg, **{'params/head': head})
  export(workdir, tmp_path / 'out')
  assert 'no longer equal' in capsys.readouterr().out
  assert checkpoints.read(tmp_path / 'out')['lm_head.weight'][2] == head.tobytes()
  assert json.loads((tmp_path / 'out/config.json').read_text())['tie_word_embeddings'] is False
  export(workdir, tmp_path / 'tied', '--step=0')
  assert checkpoints.read(tmp_path / 'tied') == checkpoints.read(original)


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


def test_an_export_of_a_run_that_was_not_imported(imported, tmp_path):
  """config.json and the tokenizer's settings are made from ours."""
  workdir = tmp_path / 'run'
  shutil.copytree(imported[1], workdir)
  shutil.rmtree(workdir / 'hf')
  export(workdir, tmp_path / 'out')
  assert checkpoints.read(tmp_path / 'out') == checkpoints.read(imported[0])
  made = json.loads((tmp_path / 'out/config.json').read_text())
  assert (made['bos_token_id'], made['eos_token_id'], made['torch_dtype']) == (0, 1, 'bfloat16')
  tokens = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  assert (tokens['bos_token'], tokens['eos_token']) == ('<s>', '</s>')
  cfg, _ = huggingface.load_variables(tmp_path / 'out', tiny.values())
  assert cfg.model == trained_run.read_config(imported[1]).model


def changed(name: str, function):
  """A change of one tensor."""

  def change(weights):
    weights[name] = function(weights[name])

  return change


DENSE = 'model.layers.0.mlp.gate_proj.weight'
BROKEN = [
  ('deepseek', lambda w: w.pop(DENSE), rf"lacks 1 tensors .*'{DENSE}'"),
  (
    'deepseek',
    lambda w: [w.pop(k) for k in list(w) if '.experts.' in k],
    r"lacks 48 tensors that config.json asks for: .*'model.layers.1.*' and 43 more",
  ),
  ('llama', lambda w: w.update(bias=w[DENSE]), "holds 1 tensors .* does not ask for: 'bias'"),
  ('deepseek', changed(DENSE, lambda x: x[1:]), r'is \[23, 16\] in .*, but \[24, 16\] by config'),
  ('llama', changed(DENSE, lambda x: x.astype(np.int8)), 'is of dtype I8; only F32'),
  ('deepseek_v3', lambda w: w.pop('model.layers.3.enorm.weight'), 'lacks 1 tensors .*enorm'),
  (
    'deepseek_v3',
    changed('model.layers.3.shared_head.head.weight', lambda x: -x),
    "'model.layers.3.shared_head.head.weight' in .* must repeat 'lm_head.weight'",
  ),
  ('deepseek_v3', lambda w: w.pop(f'{DENSE}_scale_inv'), 'F8_E4M3 without a tensor of scales'),
  (
    'deepseek_v3',
    changed(f'{DENSE}_scale_inv', lambda x: x[:-1]),
    r'are F32\[4, 4\] in .* but must be F32\[5, 4\] for weight_block_size \[5, 5\]',
  ),
  (
    'deepseek_v3',
    lambda w: w.update({'lm_head.weight_scale_inv': np.ones((7, 4), np.float32)}),
    'BF16 with a tensor of scales',
  ),
]


@pytest.mark.parametrize('family, change, message', BROKEN)
def test_files_that_are_not_the_model(tmp_path, family, change, message):
  """Refused before anything is written."""
  v3 = family == 'deepseek_v3'
  hf = checkpoints.config(family, **({'quantization_config': BLOCK} if v3 else {}))
  weights = checkpoints.tensors(hf)
  weights = checkpoints.quantise(weights, block=5) if v3 else weights
  change(weights)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  with pytest.raises(errors.InputError, match=message):
    import_(original, tmp_path / 'runs/run')
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_float8_needs_a_quantization_config(tmp_path):
  hf = checkpoints.config('deepseek_v3')
  weights = checkpoints.quantise(checkpoints.tensors(hf), block=5)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  with pytest.raises(errors.InputError, match='needs a quantization_config in config.json'):
    import_(original, tmp_path / 'run')


def test_tied_models_may_repeat_the_head(tmp_path):
  hf = checkpoints.config('llama', tie_word_embeddings=True)
  weights = checkpoints.tensors(hf)
  weights['lm_head.weight'] = weights['model.embed_tokens.weight']
  weights['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  import_(original, tmp_path / 'run')
  export(tmp_path / 'run', tmp_path / 'out')
  want = checkpoints.read(original)
  del want['model.layers.0.self_attn.rotary_emb.inv_freq']
  assert checkpoints.read(tmp_path / 'out') == want
  weights['lm_head.weight'] = -weights['lm_head.weight']
  checkpoints.write_file(original / 'model.safetensors', weights)
  with pytest.raises(errors.InputError, match="'lm_head.weight' in .* must repeat 'model.embed"):
    import_(original, tmp_path / 'other')


def copy_of(imported, tmp_path):
  directory = tmp_path / 'in'
  shutil.copytree(imported[0], directory)
  return directory


def test_small_files_come_back_and_others_do_not(imported, tmp_path):
  directory = copy_of(imported, tmp_path)
  kept = {'modeling_deepseek.py': b'raise SystemExit', 'LICENSE-MODEL': b'x', 'README.md': b'y'}
  for name, content in (kept | {'model.onnx': b'z', 'old.bin': b'z'}).items():
    (directory / name).write_bytes(content)
  import_(directory, tmp_path / 'run')
  export(tmp_path / 'run', tmp_path / 'out')
  assert contents(tmp_path / 'out') == contents(imported[0]) | kept


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
  export(tmp_path / 'run', tmp_path / 'out')
  got, loaded = huggingface.load_variables(tmp_path / 'out', parse.to_dict(cfg))
  assert got.model == cfg.model
  jax.tree.map(np.testing.assert_array_equal, loaded['params'], dict(state.params))


def test_tokens_by_id(imported, tmp_path):
  """Without names, config.json's ids are looked up; an id may be a list."""
  directory = copy_of(imported, tmp_path)
  (directory / 'tokenizer_config.json').unlink()
  hf = json.loads((directory / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(hf | {'eos_token_id': [2, 1]}))
  import_(directory, tmp_path / 'run')
  data = trained_run.read_config(tmp_path / 'run').data
  assert (data.bos_token, data.eos_token) == ('<s>', 'a')
  (directory / 'config.json').write_text(json.dumps(hf | {'eos_token_id': None}))
  with pytest.raises(errors.InputError, match='says which token is eos_token'):
    import_(directory, tmp_path / 'other')


def test_refused_directories(imported, tmp_path):
  original, workdir = imported
  directory = copy_of(imported, tmp_path)
  (directory / 'tokenizer.json').unlink()
  for arguments, message in (
    ((tmp_path / 'none', tmp_path / 'run'), 'none/config.json must be a readable JSON'),
    ((directory, tmp_path / 'run'), 'holds no tokenizer.json'),
    ((original, workdir), r'--workdir=.* must be absent or an empty directory'),
    ((original, original / 'config.json'), 'must be absent or an empty directory'),
    ((original, original / 'config.json/run'), 'cannot be made'),
    ((original, tmp_path / 'run', '--param_dtype=float8'), "--param_dtype='float8' must be one of"),
    ((original, tmp_path / 'run', '--step=1'), '--step=1 has no effect with --from_hf'),
  ):
    with pytest.raises(errors.InputError, match=message):
      import_(*arguments)
  for arguments, message in (
    ((tmp_path / 'none', tmp_path / 'out'), 'holds no checkpoints'),
    ((workdir, original), '--to_hf=.* must be absent or an empty directory'),
    ((workdir, tmp_path / 'out', '--dtype=float16'), "--dtype='float16' must be one of original"),
    ((workdir, tmp_path / 'out', '--step=3'), 'step=3 is not among the checkpoints'),
    ((workdir, tmp_path / 'out', '--param_dtype=float32'), 'has no effect with --to_hf'),
  ):
    with pytest.raises(errors.InputError, match=message):
      export(*arguments)
  with pytest.raises(errors.InputError, match='give either --from_hf=DIR'):
    in_process.run(convert, f'--workdir={tmp_path / "run"}')
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_a_failed_conversion_leaves_nothing(imported, tmp_path, monkeypatch):
  original, workdir = imported
  for kind, method, convert_ in (
    (stream_writer.Writer, 'write', lambda: import_(original, tmp_path / 'run')),
    (stream_reader.Reader, 'read', lambda: export(workdir, tmp_path / 'out')),
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
  import_(imported[0], tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == ['run']
  assert trained_run.read_meta(tmp_path / 'run')['step'] == 0


@pytest.mark.slow
def test_a_killed_import(tmp_path):
  """SIGKILL in the middle: no workdir, and the next attempt succeeds."""
  hf = checkpoints.config('deepseek', num_hidden_layers=checkpoints.LAYERS)
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  command = [sys.executable, '-m', 'experiments.convert', f'--from_hf={original}']
  command.append(f'--workdir={tmp_path / "run"}')
  # Every write takes long enough that the signal comes between two of them.
  slow = (
    'import runpy, sys, time\n'
    'from moe_jax.checkpoints import stream_writer as c\n'
    'write = c.Writer.write\n'
    'c.Writer.write = lambda *a: (write(*a), print("written", flush=True), time.sleep(0.2))\n'
    'sys.argv = sys.argv[1:]\n'
    'runpy.run_module("experiments.convert", run_name="__main__")\n'
  )
  with subprocess.Popen(
    [command[0], '-c', slow, 'convert', *command[3:]], stdout=subprocess.PIPE, text=True
  ) as process:
    for _ in range(5):
      assert process.stdout.readline().strip() == 'written'
    process.kill()
  assert not (tmp_path / 'run').exists()
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'imported deepseek' in done.stdout
  assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'run']
