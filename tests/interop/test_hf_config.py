"""config.json <-> our config: what is read, what is refused, and that both ways agree."""

import pytest

from moe_jax import errors
from moe_jax.config import moe_config, parse, schema
from moe_jax.interop import hf_config
from tests import tiny
from tests.interop import checkpoints, published


def from_hf(hf: dict, **overrides) -> schema.Config:
  modules = hf_config.declared_mtp_layers(hf)
  return parse.from_dict(hf_config.to_values(hf, tiny.values(**overrides), modules))


def test_dense():
  model = from_hf(published.CONFIGS['67b']).model
  assert not model.is_moe and model.num_layers == 95 and model.num_dense_layers == 0
  attention = model.attention
  assert (attention.kind, attention.num_kv_heads, attention.head_dim) == ('gqa', 8, 128)
  assert (attention.rope.layout, attention.rope.theta) == ('half', 10_000.0)
  assert attention.rope.yarn.factor == 1.0
  assert (model.mlp_dim, model.max_seq_len, model.norm_eps) == (22016, 4096, 1e-6)


def test_explicit_head_dim():
  hf = checkpoints.config('llama', head_dim=6)
  assert from_hf(hf).model.attention.head_dim == 6


def test_moe_16b():
  model = from_hf(published.CONFIGS['moe-16b']).model
  moe = model.moe
  assert (moe.num_experts, moe.num_shared_experts, moe.num_experts_per_tok) == (64, 2, 6)
  assert (moe.score_func, moe.norm_topk_prob, moe.routed_scaling_factor) == ('softmax', False, 1.0)
  assert (model.num_dense_layers, moe.moe_mlp_dim, moe.num_expert_groups) == (1, 1408, 1)
  assert moe.balance.expert_level == moe_config.LossConfig(0.001, 'sequence')


def test_v2():
  model = from_hf(published.CONFIGS['v2']).model
  moe, mla, yarn = model.moe, model.attention.mla, model.attention.rope.yarn
  assert (moe.num_expert_groups, moe.num_limited_groups, moe.group_score) == (8, 3, 'max')
  assert moe.routed_scaling_factor == 16.0 and moe.expert_bias.update_rule == 'none'
  assert (mla.q_lora_rank, mla.kv_lora_rank, mla.v_head_dim) == (1536, 512, 128)
  assert (mla.qk_nope_head_dim, mla.qk_rope_head_dim) == (128, 64)
  assert model.attention.rope.layout == 'interleaved'
  assert (yarn.factor, yarn.original_max_seq_len, yarn.mscale) == (40.0, 4096, 0.707)
  # Constants of the released code, see the paper's section 3.1.4: 192^-0.5 * 1.260804^2.
  assert model.attention.softmax_scale == pytest.approx(0.1147214, rel=1e-6)


def test_v3():
  model = from_hf(published.CONFIGS['v3']).model
  moe = model.moe
  assert (moe.score_func, moe.norm_topk_prob, moe.routed_scaling_factor) == ('sigmoid', True, 2.5)
  assert (moe.num_expert_groups, moe.num_limited_groups, moe.group_score) == (8, 4, 'top2_sum')
  assert (moe.expert_bias.update_rule, moe.expert_bias.form) == ('sign', 'additive')
  assert moe.balance.normalized_expert_level.weight == 0.001
  assert moe.balance.expert_level.weight == 0.0
  assert (model.num_dense_layers, model.num_mtp_layers) == (3, 1)
  assert model.attention.softmax_scale == pytest.approx(0.1352338, rel=1e-6)


def test_the_settings_of_another_router_are_left_behind():
  other = {
    'model__moe__router': 'expert_choice',
    'model__moe__balance__switch__weight': 0.5,
    'model__attention__num_experts': 0,
  }
  moe = from_hf(checkpoints.config('deepseek'), **other).model.moe
  assert moe.router == 'topk' and moe.balance.switch.weight == 0.0


@pytest.mark.parametrize('per_tok, norm, scaling', [(2, True, 1.0), (1, False, 16.0)])
def test_v2_divides_or_scales(per_tok, norm, scaling):
  hf = checkpoints.config('deepseek_v2', norm_topk_prob=True, num_experts_per_tok=per_tok)
  moe = from_hf(hf).model.moe
  assert (moe.norm_topk_prob, moe.routed_scaling_factor) == (norm, scaling)


def test_without_routed_experts_all_layers_are_dense():
  model = from_hf(checkpoints.config('deepseek_v2', n_routed_experts=None)).model
  assert not model.is_moe and model.attention.kind == 'mla'
  assert not from_hf(checkpoints.config('deepseek', first_k_dense_replace=3)).model.is_moe


def test_both_spellings_of_rope():
  older = checkpoints.config('deepseek_v3')
  newer = {k: v for k, v in older.items() if not k.startswith('rope_')}
  yarn = {k: v for k, v in checkpoints.YARN.items() if k != 'type'}
  newer['rope_parameters'] = yarn | {'rope_type': 'yarn', 'rope_theta': 10000.0}
  assert from_hf(newer) == from_hf(older)
  default = newer | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}}
  rope = from_hf(default).model.attention.rope
  assert (rope.theta, rope.yarn.factor) == (500.0, 1.0)


def test_plain_yarn_of_a_dense_model():
  """Cosines grow by 0.1 ln s + 1, the scale of the softmax stays."""
  plain = {k: v for k, v in checkpoints.YARN.items() if not k.startswith('mscale')}
  attention = from_hf(checkpoints.config('llama', rope_scaling=plain)).model.attention
  assert (attention.rope.yarn.mscale, attention.rope.yarn.mscale_all_dim) == (1.0, 0.0)
  assert attention.softmax_scale == attention.head_dim**-0.5


def test_rope_interleave_of_v3():
  hf = checkpoints.config('deepseek_v3', rope_interleave=False)
  assert from_hf(hf).model.attention.rope.layout == 'half'


YARN = checkpoints.YARN
REFUSED = [
  ('llama', {'model_type': 'qwen2'}, r"model_type='qwen2'.*supported ones: llama, deepseek, "),
  ('llama', {'model_type': None}, 'model_type=None'),
  ('llama', {'attention_bias': True}, 'attention_bias=True is not supported; only False is'),
  ('llama', {'mlp_bias': True}, 'mlp_bias=True'),
  ('llama', {'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported; only 'silu' is"),
  ('llama', {'sliding_window': 4096}, 'sliding_window=4096 is not supported'),
  ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2}}, "rope type 'linear'"),
  ('llama', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8}}, "rope type 'llama3'"),
  ('llama', {'rope_scaling': YARN}, 'both be absent without it'),
  ('llama', {'rope_theta': None}, 'rope_theta is missing'),
  ('llama', {'rope_theta': []}, r'rope_theta=\[\] must be a number from 1 to 1e\+12'),
  ('llama', {'rope_theta': float('inf')}, 'rope_theta=inf must be'),
  ('llama', {'initializer_range': 'abc'}, "initializer_range='abc' must be a number"),
  ('llama', {'initializer_range': 0}, 'initializer_range=0 must be'),
  ('llama', {'initializer_range': True}, 'initializer_range=True must be'),
  ('llama', {'rms_norm_eps': 10**18}, 'rms_norm_eps=1000000000000000000 must be'),
  ('llama', {'rms_norm_eps': float('nan')}, 'rms_norm_eps=nan must be'),
  ('llama', {'max_position_embeddings': 10**9}, 'max_position_embeddings=1000000000 must be'),
  ('llama', {'hidden_size': 10**30}, 'hidden_size=10*00 must be a whole number'),
  ('llama', {'hidden_size': True}, 'hidden_size=True must be a whole number'),
  ('llama', {'model_type': ['llama']}, "model_type=.'llama'. "),
  ('llama', {'num_key_value_heads': 1.0}, 'num_key_value_heads=1.0 must be'),
  ('deepseek', {'norm_topk_prob': 1}, 'norm_topk_prob=1 must be true or false'),
  ('deepseek', {'n_routed_experts': -8}, 'n_routed_experts=-8 must be a whole number from 0'),
  ('deepseek', {'aux_loss_alpha': '1'}, "aux_loss_alpha='1' must be a number from 0"),
  ('deepseek_v2', {'q_lora_rank': 'none'}, "q_lora_rank='none' must be a whole number"),
  ('deepseek_v2', {'rope_scaling': YARN | {'factor': 'x'}}, "factor='x' must be a number"),
  ('deepseek_v2', {'rope_scaling': YARN | {'mscale': []}}, r'mscale=\[\] must be a number'),
  ('deepseek_v3', {'num_nextn_predict_layers': 0.5}, 'num_nextn_predict_layers=0.5 must'),
  ('llama', {'vocab_size': None}, 'vocab_size is missing'),
  ('llama', {'num_attention_heads': 0}, 'num_attention_heads=0 must be a whole number from 1 to'),
  ('llama', {'hidden_size': '16'}, "hidden_size='16' must be a whole number"),
  ('llama', {'rope_scaling': 'yarn'}, "rope_scaling='yarn' must be null or an object"),
  ('llama', {'num_attention_heads': 3}, 'hidden_size=16 must be a multiple of'),
  (
    'llama',
    {'rope_parameters': {'a': {'rope_theta': 1e4}}, 'rope_theta': 1e4},
    'rope type default',
  ),
  ('deepseek', {'moe_layer_freq': 2}, 'moe_layer_freq=2 is not supported; only 1 is'),
  ('deepseek', {'routed_scaling_factor': 2.0}, 'has no effect in the code of model_type'),
  ('deepseek', {'topk_method': 'noaux_tc'}, "topk_method='noaux_tc'"),
  ('deepseek_v2', {'scoring_func': 'sigmoid'}, "scoring_func='sigmoid' is not supported"),
  ('deepseek_v2', {'rope_scaling': YARN | {'mscale_all_dim': 0}}, 'must both be there with MLA'),
  ('deepseek_v2', {'rope_scaling': YARN | {'attention_factor': 2.0}}, 'no attention_factor'),
  (
    'deepseek_v2',
    {'rope_scaling': {'type': 'yarn', 'factor': 40}},
    'original_max_position_embeddings is missing',
  ),
  ('deepseek_v2', {'rope_parameters': {'rope_type': 'default'}}, 'contradict each other'),
  ('deepseek_v3', {'topk_method': 'greedy'}, "topk_method='greedy'.*only noaux_tc is"),
  ('deepseek_v3', {'routed_scaling_factor': None}, 'routed_scaling_factor is missing'),
]


@pytest.mark.parametrize('family, changes, message', REFUSED)
def test_refused_by_name(family, changes, message):
  hf = checkpoints.config(family) | changes
  with pytest.raises(errors.InputError, match=message):
    from_hf(hf)


def test_quantization():
  assert hf_config.quantization(published.CONFIGS['v3']) == (128, 128)
  assert hf_config.quantization(published.CONFIGS['v2']) is None
  for wrong in ({'quant_method': 'gptq', 'bits': 4}, {'quant_method': 'fp8', 'fmt': 'e4m3'}):
    with pytest.raises(errors.InputError, match="only quant_method 'fp8' in fmt e4m3"):
      hf_config.quantization({'quantization_config': wrong})
  with pytest.raises(errors.InputError, match="quantization_config='fp8' must be an object"):
    hf_config.quantization({'quantization_config': 'fp8'})
