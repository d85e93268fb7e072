import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoints import stream_reader, stream_writer
from moe_jax.config import parse
from moe_jax.data import kept_files
from moe_jax.interop import huggingface, source
from moe_jax.runs import trained_run
from tests import tiny
from tests.interop import checkpoints, conversions


def test_dtypes(tmp_path):
  """--param_dtype and --dtype; biases of experts stay float32."""
  hf = checkpoints.config('deepseek_v3')
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  conversions.import_(original, tmp_path / 'run', '--param_dtype=float32')
  assert trained_run.read_config(tmp_path / 'run').model.param_dtype == 'float32'
  conversions.export(tmp_path / 'run', tmp_path / 'same')
  assert checkpoints.read(tmp_path / 'same') == checkpoints.read(original)
  conversions.export(tmp_path / 'run', tmp_path / 'wide', '--dtype=float32', '--step=0')
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


def rewritten(imported, tmp_path, cfg, **arrays):
  """A copy of the imported workdir with another config and some other leaves."""
  workdir = tmp_path / 'changed'
  shutil.copytree(imported[1], workdir)
  with stream_reader.Reader(workdir / 'checkpoints', 0) as reader:
    meta = reader.meta | {'config': parse.to_dict(cfg)}
    leaves = source.abstract_leaves(cfg.model)
    with stream_writer.Writer(workdir / 'checkpoints', 5, leaves, meta) as writer:
      for name, leaf in source.by_name(leaves).items():
        writer.write(name, (), arrays.get(name, reader.read(name).astype(leaf.dtype)))
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
  conversions.export(workdir, tmp_path / 'out')
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


def test_a_tied_head_of_an_older_import_that_was_trained_is_untied(tmp_path, capsys):
  hf = checkpoints.config('llama', tie_word_embeddings=True)
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  # As imports were before there was model.tie_embeddings: two leaves, of which nothing is said.
  huggingface.import_checkpoint(original, tiny.values(), tmp_path / 'run', untie=True)
  record = json.loads((tmp_path / 'run/hf/moe_jax.json').read_text())
  (tmp_path / 'run/hf/moe_jax.json').write_text(json.dumps(record | {'untied': False}))
  cfg = trained_run.read_config(tmp_path / 'run')
  head = np.full((checkpoints.D, checkpoints.V), 2.0, ml_dtypes.bfloat16)
  workdir = rewritten((original, tmp_path / 'run'), tmp_path, cfg, **{'params/head': head})
  conversions.export(workdir, tmp_path / 'out')
  assert 'trained apart' in capsys.readouterr().out
  assert checkpoints.read(tmp_path / 'out')['lm_head.weight'][2] == head.tobytes()
  assert json.loads((tmp_path / 'out/config.json').read_text())['tie_word_embeddings'] is False
  # Two equal matrices in the files are one in their own reader: after training that must not be.
  copies = {name: data for name, data in checkpoints.tensors(hf).items()}
  copies['lm_head.weight'] = copies['model.embed_tokens.weight']
  repeated = checkpoints.write(tmp_path / 'twice', hf, copies)
  conversions.import_(repeated, tmp_path / 'two', '--untie')
  conversions.export(tmp_path / 'two', tmp_path / 'apart')
  assert json.loads((tmp_path / 'apart/config.json').read_text())['tie_word_embeddings'] is False
  conversions.export(workdir, tmp_path / 'tied', '--step=0')
  assert checkpoints.read(tmp_path / 'tied') == checkpoints.read(original)


def test_the_small_files_come_along_when_an_import_is_trained(imported, tmp_path, capsys):
  """What the tuned model changes is said; what it does not touch comes back byte by byte."""
  values = parse.to_dict(trained_run.read_config(imported[1]))
  values['model'] |= {'param_dtype': 'float32', 'max_seq_len': 128}
  workdir = rewritten(imported, tmp_path, parse.from_dict(values))
  shutil.rmtree(workdir / 'hf')
  (imported[1] / 'hf/chat_template.jinja').write_text('{{ messages }}')
  kept_files.carry(imported[1], workdir)
  conversions.export(workdir, tmp_path / 'out')
  got, want = conversions.contents(tmp_path / 'out'), conversions.contents(imported[0])
  assert got.pop('chat_template.jinja') == b'{{ messages }}'
  after, before = (json.loads(files.pop('config.json')) for files in (got, want))
  assert got == want
  changes = {'torch_dtype': 'float32', 'max_position_embeddings': 128}
  assert after == before | changes
  said = capsys.readouterr().out
  assert 'differs from the imported one in max_position_embeddings, torch_dtype' in said
  assert {item[0] for item in checkpoints.read(tmp_path / 'out').values()} == {'F32'}


def test_an_export_of_a_run_that_was_not_imported(imported, tmp_path):
  """config.json and the tokenizer's settings are made from ours."""
  workdir = tmp_path / 'run'
  shutil.copytree(imported[1], workdir)
  shutil.rmtree(workdir / 'hf')
  conversions.export(workdir, tmp_path / 'out')
  assert checkpoints.read(tmp_path / 'out') == checkpoints.read(imported[0])
  made = json.loads((tmp_path / 'out/config.json').read_text())
  assert (made['bos_token_id'], made['eos_token_id'], made['torch_dtype']) == (0, 1, 'bfloat16')
  tokens = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  assert (tokens['bos_token'], tokens['eos_token']) == ('<s>', '</s>')
  cfg, _ = huggingface.load_variables(tmp_path / 'out', tiny.values())
  assert cfg.model == trained_run.read_config(imported[1]).model
