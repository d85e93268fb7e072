import json

import pytest

from moe_jax import errors
from moe_jax.interop import huggingface
from moe_jax.runs import trained_run
from tests import tiny
from tests.interop import checkpoints, conversions


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """(directory, workdir) of an imported V2."""
  root = tmp_path_factory.mktemp('imported')
  hf = checkpoints.config('deepseek_v2')
  original = checkpoints.write(root / 'in', hf, checkpoints.tensors(hf))
  huggingface.import_checkpoint(original, tiny.values(), root / 'run')
  return original, root / 'run'


def test_small_files_come_back_and_others_do_not(imported, tmp_path):
  directory = conversions.copy_of(imported, tmp_path)
  kept = {'modeling_deepseek.py': b'raise SystemExit', 'LICENSE-MODEL': b'x', 'README.md': b'y'}
  for name, content in (kept | {'model.onnx': b'z', 'old.bin': b'z'}).items():
    (directory / name).write_bytes(content)
  conversions.import_(directory, tmp_path / 'run')
  conversions.export(tmp_path / 'run', tmp_path / 'out')
  assert conversions.contents(tmp_path / 'out') == conversions.contents(imported[0]) | kept


def test_tokens_by_id(imported, tmp_path):
  """Without names, config.json's ids are looked up; an id may be a list."""
  directory = conversions.copy_of(imported, tmp_path)
  (directory / 'tokenizer_config.json').unlink()
  hf = json.loads((directory / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(hf | {'eos_token_id': [2, 1]}))
  conversions.import_(directory, tmp_path / 'run')
  data = trained_run.read_config(tmp_path / 'run').data
  assert (data.bos_token, data.eos_token) == ('<s>', 'a')
  (directory / 'config.json').write_text(json.dumps(hf | {'eos_token_id': None}))
  with pytest.raises(errors.InputError, match='says which token is eos_token'):
    conversions.import_(directory, tmp_path / 'other')
