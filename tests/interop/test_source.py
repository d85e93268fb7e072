import numpy as np
import pytest

from experiments import convert
from moe_jax import errors
from moe_jax.interop import huggingface
from tests import in_process, tiny
from tests.interop import checkpoints, conversions


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """(directory, workdir) of an imported V2."""
  root = tmp_path_factory.mktemp('imported')
  hf = checkpoints.config('deepseek_v2')
  original = checkpoints.write(root / 'in', hf, checkpoints.tensors(hf))
  huggingface.import_checkpoint(original, tiny.values(), root / 'run')
  return original, root / 'run'


DENSE = 'model.layers.0.mlp.gate_proj.weight'
BROKEN = [
  ('deepseek', lambda w: w.pop(DENSE), rf"lacks 1 tensors .*'{DENSE}'"),
  (
    'deepseek',
    lambda w: [w.pop(k) for k in list(w) if '.experts.' in k and '.7.' not in k],
    r"lacks 42 tensors that config.json asks for: .*'model.layers.1.*' and 37 more",
  ),
  ('llama', lambda w: w.update(bias=w[DENSE]), "holds 1 tensors .* does not ask for: 'bias'"),
  (
    'deepseek',
    conversions.changed(DENSE, lambda x: x[1:]),
    r'is \[23, 16\] in .*, but \[24, 16\] by config',
  ),
  ('llama', conversions.changed(DENSE, lambda x: x.astype(np.int8)), 'is of dtype I8; only F32'),
  ('deepseek_v3', lambda w: w.pop('model.layers.3.enorm.weight'), 'lacks 1 tensors .*enorm'),
  (
    'deepseek_v3',
    conversions.changed('model.layers.3.shared_head.head.weight', lambda x: -x),
    "'model.layers.3.shared_head.head.weight' in .* must repeat 'lm_head.weight'",
  ),
  ('deepseek_v3', lambda w: w.pop(f'{DENSE}_scale_inv'), 'F8_E4M3 without a tensor of scales'),
  (
    'deepseek_v3',
    conversions.changed(f'{DENSE}_scale_inv', lambda x: x[:-1]),
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
  hf = checkpoints.config(family, **({'quantization_config': conversions.BLOCK} if v3 else {}))
  weights = checkpoints.tensors(hf)
  weights = checkpoints.quantise(weights, block=5) if v3 else weights
  change(weights)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  with pytest.raises(errors.InputError, match=message):
    conversions.import_(original, tmp_path / 'runs/run')
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_float8_needs_a_quantization_config(tmp_path):
  hf = checkpoints.config('deepseek_v3')
  weights = checkpoints.quantise(checkpoints.tensors(hf), block=5)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  with pytest.raises(errors.InputError, match='needs a quantization_config in config.json'):
    conversions.import_(original, tmp_path / 'run')


def test_tied_models_may_repeat_the_head(tmp_path):
  hf = checkpoints.config('llama', tie_word_embeddings=True)
  weights = checkpoints.tensors(hf)
  weights['lm_head.weight'] = weights['model.embed_tokens.weight']
  weights['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
  original = checkpoints.write(tmp_path / 'in', hf, weights)
  conversions.import_(original, tmp_path / 'run')
  conversions.export(tmp_path / 'run', tmp_path / 'out')
  want = checkpoints.read(original)
  del want['model.layers.0.self_attn.rotary_emb.inv_freq']
  assert checkpoints.read(tmp_path / 'out') == want
  weights['lm_head.weight'] = -weights['lm_head.weight']
  checkpoints.write_file(original / 'model.safetensors', weights)
  with pytest.raises(errors.InputError, match="'lm_head.weight' in .* must repeat 'model.embed"):
    conversions.import_(original, tmp_path / 'other')


def test_refused_directories(imported, tmp_path):
  original, workdir = imported
  directory = conversions.copy_of(imported, tmp_path)
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
      conversions.import_(*arguments)
  for arguments, message in (
    ((tmp_path / 'none', tmp_path / 'out'), 'holds no checkpoints'),
    ((workdir, original), '--to_hf=.* must be absent or an empty directory'),
    ((workdir, tmp_path / 'out', '--dtype=float16'), "--dtype='float16' must be one of original"),
    ((workdir, tmp_path / 'out', '--step=3'), 'step=3 is not among the checkpoints'),
    ((workdir, tmp_path / 'out', '--param_dtype=float32'), 'has no effect with --to_hf'),
  ):
    with pytest.raises(errors.InputError, match=message):
      conversions.export(*arguments)
  with pytest.raises(errors.InputError, match='give either --from_hf=DIR'):
    in_process.run(convert, f'--workdir={tmp_path / "run"}')
  assert [path.name for path in tmp_path.iterdir()] == ['in']
