"""The same files give the same logits here and in transformers (float32, every position).

What transformers is wrong about, or was, is tested against the released code's rule written out in
torch: see `test_v2_divides_gates_or_scales_them` and `test_masked_experts_are_out_of_reach`.
"""

import json
import os
import pathlib

import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
pytest.importorskip('torch')
# Before 5.23 DeepSeek-V2's softmax lacked YaRN's mscale^2 there.
pytest.importorskip('transformers', minversion='5.23')

import jax
import safetensors.torch
import torch
import transformers
from transformers import cache_utils, modeling_layers

from configs import base
from experiments import parity
from experiments.parity import hf_models
from moe_jax.interop import huggingface
from moe_jax.models import transformer
from tests import tiny

# Both sum in float32 but in other orders: a share of the largest logit. 9e-6 is the most that was
# seen. A wrong softmax scale, layout, frequency or group rule gives 0.9, another eps 4e-4.
RTOL = 2e-5

hf_models.one_thread()


@pytest.fixture(scope='module', params=hf_models.CASES)
def case(request, tmp_path_factory):
  """(name, what both programs computed)."""
  directory = tmp_path_factory.mktemp(request.param)
  return request.param, hf_models.measure(request.param, directory)


def assert_same(got: np.ndarray, want: np.ndarray):
  np.testing.assert_allclose(got, want, rtol=0, atol=RTOL * np.abs(want).max(), strict=True)


def largest_difference(a: hf_models.Logits, b: hf_models.Logits) -> float:
  return float(np.abs(a.logits - b.logits).max())


def load(directory, **options):
  return huggingface.load_variables(directory, base.get_config().to_dict(), **options)


def test_logits_and_experts_are_those_of_the_reference(case):
  _, measured = case
  np.testing.assert_array_equal(measured.ours.experts, measured.theirs.experts)
  assert_same(measured.ours.logits, measured.theirs.logits)


def test_exported_files_give_the_reference_its_own_logits_back(case):
  _, measured = case
  np.testing.assert_array_equal(measured.exported.logits, measured.theirs.logits)


def test_the_models_are_far_from_uniform(case):
  """Otherwise equal logits would say little."""
  _, measured = case
  logits = measured.theirs.logits
  assert logits.std() > 1
  # The model looks at its past: behind the same token come other logits elsewhere.
  ids = hf_models.tokens().ravel()
  flat = logits.reshape(len(ids), -1)
  same = [(i, j) for i in range(len(ids)) for j in range(i) if ids[i] == ids[j]]
  assert min(np.abs(flat[i] - flat[j]).max() for i, j in same) > 0.5
  for layer in measured.theirs.experts:
    assert (np.bincount(layer.astype(int).ravel(), minlength=8) > 0).sum() >= 6


def test_the_published_table_has_every_case():
  path = pathlib.Path(parity.__file__).with_name('results.json')
  assert [row['case'] for row in json.loads(path.read_text())['logits']] == list(hf_models.CASES)


def test_v2_divides_gates_or_scales_them(tmp_path):
  """The case v2_norm is compared with the released rule, which transformers does not have."""
  hf_models.make('v2_norm', tmp_path)
  model = hf_models.load_theirs('', tmp_path)
  native = hf_models.theirs(model)
  hf_models.use_released_gate(model)
  released = hf_models.theirs(model)
  np.testing.assert_array_equal(native.experts[0], released.experts[0])
  assert largest_difference(native, released) > 0.1


def test_masked_experts_are_out_of_reach(tmp_path):
  """A score of 0 for experts outside of the chosen groups, as before 5.23, is another model."""
  hf_models.make('v3', tmp_path)
  model = hf_models.load_theirs('v3', tmp_path)
  right = hf_models.theirs(model)

  def zero(mask, value):
    return (mask, 0.0 if value == float('-inf') else value)

  for gate in hf_models.gates(model):
    assert (gate.e_score_correction_bias < 0).any() and (gate.e_score_correction_bias > 0).any()
  plain = torch.Tensor.masked_fill
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.Tensor, 'masked_fill', lambda x, *args: plain(x, *zero(*args)))
    wrong = hf_models.theirs(model)
  assert (right.experts != wrong.experts).any()
  assert largest_difference(right, wrong) > 0.1


@pytest.mark.parametrize('name', ['llama_gqa', 'deepseek', 'v2', 'v3'])
def test_bfloat16_files_are_read_and_written_exactly(name, tmp_path):
  narrow, wide, again = tmp_path / 'bf16', tmp_path / 'f32', tmp_path / 'again'
  hf_models.make(name, narrow, torch.bfloat16)
  tensors = safetensors.torch.load_file(narrow / 'model.safetensors')
  wide.mkdir()
  (wide / 'config.json').write_bytes((narrow / 'config.json').read_bytes())
  safetensors.torch.save_file(
    {name: tensor.float() for name, tensor in tensors.items()}, wide / 'model.safetensors'
  )
  cfg, ours = load(narrow)
  assert cfg.model.param_dtype == 'bfloat16'
  assert ours['params']['head'].dtype == 'bfloat16'
  _, exact = load(wide)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype('float32'), b), ours, exact)
  huggingface.save(cfg, ours, again)
  written = safetensors.torch.load_file(again / 'model.safetensors')
  assert written.keys() == tensors.keys()
  for key, tensor in tensors.items():
    assert written[key].dtype == tensor.dtype, key
    assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize('name', ['v2', 'v3'])
def test_transformers_reads_fused_experts(name, tmp_path):
  hf_models.make(name, tmp_path / 'saved')
  cfg, variables = load(tmp_path / 'saved')
  huggingface.save(cfg, variables, tmp_path / 'fused', fused_experts=True)
  fused = safetensors.torch.load_file(tmp_path / 'fused' / 'model.safetensors')
  assert 'model.layers.1.mlp.experts.gate_up_proj' in fused
  got, want = (hf_models.reference(name, tmp_path / made) for made in ('fused', 'saved'))
  np.testing.assert_array_equal(got.logits, want.logits)


@pytest.mark.parametrize(
  'changes',
  [
    {'model__moe__num_experts': 0},
    {'model__moe__num_shared_experts': 0},
    {
      'model__moe__num_shared_experts': 0,
      'model__moe__score_func': 'sigmoid',
      'model__moe__expert_bias__update_rule': 'sign',
      'model__moe__norm_topk_prob': True,
    },
  ],
  ids=['dense', 'v2_without_shared_experts', 'v3_without_shared_experts'],
)
def test_transformers_reads_structures_that_were_never_released(changes, tmp_path):
  sizes = {'model__vocab_size': hf_models.VOCAB, 'model__max_seq_len': hf_models.LENGTH}
  sizes['model__attention__rope__layout'] = 'interleaved'
  cfg = tiny.make(**tiny.MLA | sizes | changes)
  variables = {
    'params': tiny.params(cfg.model),
    'router_state': tiny.router_state(cfg.model) if cfg.model.is_moe else {},
  }
  huggingface.save(cfg, variables, tmp_path / 'made')
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'made', attn_implementation='eager', output_loading_info=True
  )
  # Where there is no shared expert, its matrices are empty, and files have none.
  assert all('shared_experts' in key for key in info.pop('missing_keys'))
  assert not any(info.values())
  assert_same(hf_models.ours(cfg, variables).logits, hf_models.theirs(model.eval()).logits)


def test_transformers_drops_prediction_modules_but_counts_them(tmp_path):
  """Its config.json speaks of a module that its files lack."""
  hf_models.make('v3', tmp_path)
  hf = json.loads((tmp_path / 'config.json').read_text())
  assert hf['num_nextn_predict_layers'] == 1
  cfg, variables = load(tmp_path)
  assert cfg.model.num_mtp_layers == 0 and 'mtp_layers' not in variables['params']


def test_prediction_module_of_v3(tmp_path, monkeypatch):
  """The module alone, fed with the last states behind the final norm, as transformers drafts."""
  hf_models.make('v3', tmp_path)
  hf_models.add_prediction_module(tmp_path)
  ids = hf_models.tokens()
  rows, length = ids.shape
  cfg, variables = load(tmp_path)
  assert cfg.model.num_mtp_layers == 1
  targets = np.concatenate([ids[:, 1:], np.full((rows, 1), -1, np.int32)], axis=1)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  apply = tiny.jit(transformer.Transformer(cfg.model).apply)
  out = apply(variables, ids, positions, np.ones_like(ids), targets=targets)

  # transformers knows the numbers of the released models' modules only: 61.
  names = [r'model\.layers\.3.*']
  monkeypatch.setattr(
    transformers.DeepseekV3ForCausalLM, '_keys_to_ignore_on_load_unexpected', names
  )
  model = hf_models.load_theirs('v3', tmp_path)
  module = modeling_layers.MtpModel.from_pretrained(model)
  states = []
  model.model.norm.register_forward_hook(lambda norm, args, out: states.append(out))
  assert_same(np.asarray(out.logits), hf_models.theirs(model).logits)
  cache = cache_utils.MtpCache(config=model.config.get_mtp_config())
  ahead = torch.from_numpy(ids[:, 1:]).long()
  places = torch.arange(1, length).expand(rows, -1)
  with torch.no_grad():
    hidden = module.forward_layer(0, states[0][:, :-1], places, cache, input_ids=ahead)
    want = model.lm_head(hidden).numpy()
  assert_same(np.asarray(out.mtp.logits[0, :, :-1]), want)
