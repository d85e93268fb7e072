"""The command, there and back: bitwise equal files, whole workdirs, nothing after a refusal."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from configs import base
from moe_jax.checkpoints import stream_reader
from moe_jax.config import parse
from moe_jax.interop import huggingface, source
from moe_jax.runs import trained_run
from tests import tiny
from tests.interop import checkpoints, conversions


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
  conversions.import_(original, tmp_path / 'run')
  conversions.export(tmp_path / 'run', tmp_path / 'out')
  assert checkpoints.read(tmp_path / 'out') == checkpoints.read(original)
  assert conversions.contents(tmp_path / 'out') == conversions.contents(original)
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
  hf = checkpoints.config('deepseek_v3', quantization_config=conversions.BLOCK)
  weights = checkpoints.quantise(checkpoints.tensors(hf), block=5)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  conversions.import_(original, tmp_path / 'run')
  conversions.export(tmp_path / 'run', tmp_path / 'out')
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


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """(directory, workdir) of an imported V2."""
  root = tmp_path_factory.mktemp('imported')
  hf = checkpoints.config('deepseek_v2')
  original = checkpoints.write(root / 'in', hf, checkpoints.tensors(hf))
  huggingface.import_checkpoint(original, tiny.values(), root / 'run')
  return original, root / 'run'


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
