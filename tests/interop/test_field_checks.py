"""A mismatch between config.json and the tensors is told by the field of config.json."""

import time

import pytest

from moe_jax import errors
from moe_jax.interop import field_checks, source
from tests import tiny
from tests.interop import checkpoints

OWN = {family: checkpoints.config(family) for family in ('llama', 'deepseek', 'deepseek_v2')}
CHANGES = [
  ('llama', {'num_hidden_layers': 2}, 'num_hidden_layers=2, but the files in .* have 3;'),
  ('llama', {'num_hidden_layers': 10**9}, 'num_hidden_layers=1000000000, but .* have 3;'),
  ('llama', {'num_hidden_layers': 10**29}, 'num_hidden_layers=10*00 must be a whole number'),
  ('llama', {'vocab_size': 2**31 - 1}, 'vocab_size=2147483647, but .* have 32;'),
  ('llama', {'hidden_size': 32}, 'hidden_size=32, but .* have 16;'),
  ('llama', {'intermediate_size': 25}, r'\[25, 16\] by config.json \(intermediate_size x hidden_'),
  ('llama', {'num_key_value_heads': 2}, r'num_key_value_heads head_dim .* x hidden_size\)'),
  ('deepseek', {'n_routed_experts': 10**9}, 'n_routed_experts=1000000000, but .* have 8;'),
  ('deepseek', {'n_routed_experts': None}, 'n_routed_experts=None, but .* have 8;'),
  ('deepseek', {'first_k_dense_replace': 2}, 'first_k_dense_replace=2, but .* have 1;'),
  ('deepseek', {'n_shared_experts': None}, 'n_shared_experts=None, but .* have 1;'),
  ('deepseek', {'n_shared_experts': 3}, r'\(n_shared_experts moe_intermediate_size x hidden_size'),
  ('deepseek', {'moe_intermediate_size': 9}, r'moe_intermediate_size'),
  ('deepseek_v2', {'q_lora_rank': None}, 'q_lora_rank=None, but .* have 12;'),
  ('deepseek_v2', {'kv_lora_rank': 11}, 'kv_lora_rank=11, but .* have 10;'),
  ('deepseek_v2', {'v_head_dim': 7}, r'v_head_dim'),
  ('deepseek_v2', {'qk_rope_head_dim': 6}, r'qk_rope_head_dim'),
]


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  root = tmp_path_factory.mktemp('files')
  return {k: checkpoints.write(root / k, hf, checkpoints.tensors(hf)) for k, hf in OWN.items()}


@pytest.mark.parametrize('family, changes, message', CHANGES)
def test_a_mismatch_names_the_field_at_once(directories, family, changes, message, monkeypatch):
  found = source.json_files.read_object(directories[family] / 'config.json', '') | changes
  monkeypatch.setattr(source, 'read_json', lambda path: found)
  start = time.monotonic()
  with pytest.raises(errors.InputError, match=message):
    source.read(directories[family], tiny.values())
  assert time.monotonic() - start < 5


@pytest.mark.parametrize('family', checkpoints.HF)
@pytest.mark.parametrize('fused', [False, True])
def test_every_tensor_that_is_a_row_of_a_table_has_its_fields(family, fused):
  """The product of the fields' values is the tensor's size along each axis."""
  hf = checkpoints.config(family)
  model = source.parse.from_dict(
    source.hf_config.to_values(hf, tiny.values(), source.hf_config.declared_mtp_layers(hf))
  ).model
  head_dim = hf.get('head_dim') or hf['hidden_size'] // hf['num_attention_heads']
  values = hf | {'head_dim': head_dim}
  for name, shape in checkpoints.shapes(hf, fused=fused).items():
    told = field_checks.fields(model, name).replace(
      'head_dim (hidden_size / num_attention_heads if absent)', 'head_dim'
    )
    if '.experts.gate_up_proj' in name or '.experts.down_proj' in name:
      assert not told
      continue
    products = (axis.replace(') ', ')*').replace(' (', '*(') for axis in told.split(' x '))
    products = (axis.replace(' + ', '+').replace(' ', '*') for axis in products)
    sizes = [eval(axis, {}, values) for axis in products]
    assert tuple(sizes) == shape, (name, told)
