"""config.json of the DeepSeek families -> our config; `hf_config_export` is the way back.

Only what decides the model's outputs is read, and what cannot be expressed here is refused by name:
a value that was skipped in silence would show as slightly wrong text. Nothing is taken from a
default of someone's code where that code's versions disagree.

Families are `model_type`s: llama (DeepSeek LLM), deepseek (DeepSeekMoE), deepseek_v2, deepseek_v3.
"""

import copy
from collections.abc import Mapping
from typing import Any

from moe_jax import errors, trees
from moe_jax.config import moe_config
from moe_jax.interop import hf_values

ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'deepseek': 'DeepseekForCausalLM',
  'deepseek_v2': 'DeepseekV2ForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
}
MLA_FAMILIES = ('deepseek_v2', 'deepseek_v3')

# Values that some checkpoints of these types have and this model has not; absent and null are well.
_ONLY = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'sliding_window': (),
  'partial_rotary_factor': (1, 1.0),
  'moe_layer_freq': (1,),
}
_GREEDY = ('greedy', 'gready')  # the second is how the released code spells its default

# DeepSeek's code has this default for the balance loss, and moe-16b's config leaves the key out.
_AUX_LOSS_ALPHA = {'deepseek': 0.001, 'deepseek_v2': 0.001, 'deepseek_v3': 0.0}


def family(hf: trees.Json) -> str:
  """The `model_type`, one of ARCHITECTURES.

  Raises:
    errors.InputError: it is another one.
  """
  kind = hf.get('model_type')
  return errors.present(
    kind if isinstance(kind, str) and kind in ARCHITECTURES else None,
    f'config.json: model_type={kind!r} (architectures={hf.get("architectures")}) is not among the '
    f'supported ones: {", ".join(ARCHITECTURES)}',
  )


def to_values(hf: trees.Json, values: trees.Json, num_mtp_layers: int) -> dict[str, Any]:
  """A config's nested dict with the model that config.json describes.

  Args:
    hf: a parsed config.json.
    values: nested dicts of a whole config; all but the model and its types is kept.
    num_mtp_layers: prediction modules that the files hold.

  Raises:
    errors.InputError: a value is missing, or not supported.
  """
  kind = family(hf)
  for name, known in _ONLY.items():
    value = hf.get(name)
    errors.require(
      value is None or value in known,
      f'config.json: {name}={value!r} is not supported'
      + (f'; only {", ".join(map(repr, known))} is' if known else ''),
    )
  values = copy.deepcopy(dict(values))
  model = values['model']
  model |= {
    'vocab_size': hf_values.size(hf, 'vocab_size'),
    'tie_embeddings': hf_values.flag(hf, 'tie_word_embeddings', False),
    'max_seq_len': hf_values.size(hf, 'max_position_embeddings', most=hf_values.LONGEST),
    'embed_dim': hf_values.size(hf, 'hidden_size'),
    'mlp_dim': hf_values.size(hf, 'intermediate_size'),
    'num_layers': hf_values.size(hf, 'num_hidden_layers'),
    'num_heads': hf_values.size(hf, 'num_attention_heads'),
    'norm_eps': hf_values.real(hf, 'rms_norm_eps', 1e-30, 0.1),
    'init_std': hf_values.real(hf, 'initializer_range', 1e-9, 10, model['init_std']),
    'num_mtp_layers': num_mtp_layers,
  }
  _set_attention(kind, hf, model)
  _set_moe(kind, hf, model)
  values['paper'] = dict.fromkeys(values['paper'], 0.0)  # the widths of another model
  return values


def quantization(hf: trees.Json) -> tuple[int, int] | None:
  """Rows and columns of a block of float8 weights that shares a scale; None without quantisation.

  Raises:
    errors.InputError: it is of another kind than DeepSeek-V3's.
  """
  section = hf.get('quantization_config')
  if section is None:
    return None
  errors.require(
    isinstance(section, Mapping),
    f'config.json: quantization_config={section!r} must be an object; correct it',
  )
  block = section.get('weight_block_size')
  known = (
    section.get('quant_method') == 'fp8'
    and section.get('fmt', 'e4m3') == 'e4m3'
    and isinstance(block, (list, tuple))
    and len(block) == 2
    and all(type(n) is int and n > 0 for n in block)
  )
  errors.require(
    known,
    f"config.json: quantization_config={dict(section)} is not supported; only quant_method 'fp8' "
    'in fmt e4m3 with a weight_block_size of two numbers is, as in DeepSeek-V3',
  )
  return block[0], block[1]


def declared_mtp_layers(hf: trees.Json) -> int:
  """Prediction modules that config.json speaks of; its files may leave them out."""
  return hf_values.count(hf, 'num_nextn_predict_layers') if family(hf) == 'deepseek_v3' else 0


def _set_attention(kind: str, hf: trees.Json, model: dict[str, Any]):
  attention, heads = model['attention'], model['num_heads']
  attention |= {'kind': 'gqa', 'num_experts': 0}
  if kind in MLA_FAMILIES:
    attention['kind'] = 'mla'
    names = ('kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
    attention['mla'] = {name: hf_values.size(hf, name) for name in names}
    attention['mla']['q_lora_rank'] = hf_values.count(hf, 'q_lora_rank')
  else:
    attention['num_kv_heads'] = hf_values.size(hf, 'num_key_value_heads', heads)
    given = hf_values.count(hf, 'head_dim')
    errors.require(
      given > 0 or model['embed_dim'] % heads == 0,
      f'config.json: hidden_size={model["embed_dim"]} must be a multiple of '
      f'num_attention_heads={heads} where there is no head_dim',
    )
    attention['head_dim'] = given or model['embed_dim'] // heads
  interleaved = kind == 'deepseek_v2' or (
    kind == 'deepseek_v3' and hf_values.flag(hf, 'rope_interleave', True)
  )
  rope, theta = _rope_parameters(hf)
  attention['rope'] = {
    'theta': theta,
    'layout': 'interleaved' if interleaved else 'half',
    'yarn': _yarn(kind, rope, attention['rope']['yarn']),
  }


def _rope_parameters(hf: trees.Json) -> tuple[trees.Json, float]:
  """The dict on stretched rotations, in the older or newer spelling, and theta."""
  newer, older = hf.get('rope_parameters'), hf.get('rope_scaling')
  for name, section in (('rope_parameters', newer), ('rope_scaling', older)):
    errors.require(
      section is None or isinstance(section, Mapping),
      f'config.json: {name}={section!r} must be null or an object with a rope_type; correct it',
    )
  errors.require(
    not (newer and older) or dict(older).items() <= dict(newer).items(),
    f'config.json: rope_parameters={newer} and rope_scaling={older} contradict each other; remove '
    'one of them',
  )
  rope = dict(newer or older or {})
  theta = rope.pop('rope_theta', None)
  theta = hf.get('rope_theta') if theta is None else theta
  return rope, hf_values.real({'rope_theta': theta}, 'rope_theta', 1, 1e12)


def _yarn(kind: str, rope: trees.Json, off: trees.Json) -> dict[str, Any]:
  """The section `model.attention.rope.yarn`; `off`, with factor 1, where nothing is stretched."""
  rope_type = rope.get('rope_type', rope.get('type', 'default'))
  errors.require(
    rope_type in ('default', 'yarn'),
    f'config.json: rope type {rope_type!r} is not supported; only default and yarn are',
  )
  if rope_type == 'default':
    known = ('rope_type', 'type', 'partial_rotary_factor')
    unknown = [name for name in rope if name not in known]
    errors.require(
      not unknown and rope.get('partial_rotary_factor') in (None, 1, 1.0),
      f'config.json: rope_parameters={dict(rope)} is not supported with rope type default',
    )
    return dict(off) | {'factor': 1.0}
  both = [hf_values.real(rope, name, 0, 100, 0) for name in ('mscale', 'mscale_all_dim')]
  # With one of the two, DeepSeek's code and that of transformers disagree on the cosines. Without
  # MLA the pair changes the cosines alone; the scale of the softmax stays.
  problem = any(both) and not (kind in MLA_FAMILIES and all(both))
  problem |= rope.get('attention_factor') is not None or rope.get('truncate') is False
  errors.require(
    not problem,
    f'config.json: rope_scaling={dict(rope)} of model_type {kind!r} is not supported: mscale and '
    'mscale_all_dim must both be there with MLA and both be absent without it, and there must be '
    'no attention_factor and no truncate=false',
  )
  return {
    'factor': hf_values.real(rope, 'factor', 1, 1e6),
    'original_max_seq_len': hf_values.size(
      rope, 'original_max_position_embeddings', most=hf_values.LONGEST
    ),
    'beta_fast': hf_values.real(rope, 'beta_fast', 1e-3, 1e6, 32),
    'beta_slow': hf_values.real(rope, 'beta_slow', 1e-3, 1e6, 1),
    'mscale': both[0] or 1.0,
    'mscale_all_dim': both[1],
  }


def _set_moe(kind: str, hf: trees.Json, model: dict[str, Any]):
  moe, layers = model['moe'], model['num_layers']
  num_experts = 0 if kind == 'llama' else hf_values.count(hf, 'n_routed_experts')
  dense = min(hf_values.count(hf, 'first_k_dense_replace'), layers) if num_experts else layers
  if dense == layers:
    moe |= {'num_experts': 0, 'num_shared_experts': 0}
    model['num_dense_layers'] = 0
    return
  model['num_dense_layers'] = dense
  moe |= {
    'num_experts': num_experts,
    'num_shared_experts': hf_values.count(hf, 'n_shared_experts'),
    'num_experts_per_tok': hf_values.size(hf, 'num_experts_per_tok'),
    'moe_mlp_dim': hf_values.size(hf, 'moe_intermediate_size'),
    'router': 'topk',
    'norm_topk_prob': hf_values.flag(hf, 'norm_topk_prob'),
    'num_expert_groups': 1,
    'num_limited_groups': 1,
  }
  moe['capacity'] = moe['capacity'] | {'policy': 'none'}
  {'deepseek': _set_v1, 'deepseek_v2': _set_v2, 'deepseek_v3': _set_v3}[kind](hf, moe)
  _set_losses(kind, hf, moe)


def _set_v1(hf: trees.Json, moe: dict[str, Any]):
  _require_gate(hf, 'deepseek', 'softmax', _GREEDY)
  scaling = hf.get('routed_scaling_factor')
  errors.require(
    scaling in (None, 1, 1.0),
    f'config.json: routed_scaling_factor={scaling} has no effect in the code of model_type '
    "'deepseek'; set it to 1.0",
  )
  moe['norm_topk_prob'] &= moe['num_experts_per_tok'] > 1  # the released code divides two or more
  moe |= {'score_func': 'softmax', 'group_score': 'max', 'routed_scaling_factor': 1.0}
  moe['expert_bias'] = moe['expert_bias'] | {'update_rule': 'none'}


def _set_v2(hf: trees.Json, moe: dict[str, Any]):
  _require_gate(hf, 'deepseek_v2', 'softmax', (*_GREEDY, 'group_limited_greedy'))
  scaling = hf_values.real(hf, 'routed_scaling_factor', 1e-6, 1e6, 1.0)
  # The released code divides the gates by their sum OR scales them, where this model does the one
  # and then the other; and it divides where there is more than one gate.
  moe['norm_topk_prob'] &= moe['num_experts_per_tok'] > 1
  moe['routed_scaling_factor'] = 1.0 if moe['norm_topk_prob'] else scaling
  moe |= {'score_func': 'softmax', 'group_score': 'max'}
  moe['expert_bias'] = moe['expert_bias'] | {'update_rule': 'none'}
  if hf.get('topk_method') == 'group_limited_greedy':
    moe |= {
      'num_expert_groups': hf_values.size(hf, 'n_group'),
      'num_limited_groups': hf_values.size(hf, 'topk_group'),
    }


def _set_v3(hf: trees.Json, moe: dict[str, Any]):
  _require_gate(hf, 'deepseek_v3', 'sigmoid', ('noaux_tc',))
  moe |= {
    'score_func': 'sigmoid',
    'group_score': 'top2_sum',
    'routed_scaling_factor': hf_values.real(hf, 'routed_scaling_factor', 1e-6, 1e6),
    'num_expert_groups': hf_values.size(hf, 'n_group'),
    'num_limited_groups': hf_values.size(hf, 'topk_group'),
  }
  moe['expert_bias'] = moe['expert_bias'] | {'update_rule': 'sign', 'form': 'additive'}


def _require_gate(hf: trees.Json, kind: str, score_func: str, methods: tuple[str, ...]):
  value = hf.get('scoring_func', score_func)
  errors.require(
    value == score_func,
    f'config.json: scoring_func={value!r} is not supported with model_type {kind!r}; only '
    f'{score_func!r} is',
  )
  value = hf.get('topk_method', methods[0])
  errors.require(
    value in methods,
    f'config.json: topk_method={value!r} is not supported with model_type {kind!r}; only '
    f'{", ".join(methods)} is',
  )


def _set_losses(kind: str, hf: trees.Json, moe: dict[str, Any]):
  """One balance loss: V3 divides the scores by their sum first (its report, section 2.1.2)."""
  name = 'normalized_expert_level' if kind == 'deepseek_v3' else 'expert_level'
  weight = hf_values.real(hf, 'aux_loss_alpha', 0, 1e3, _AUX_LOSS_ALPHA[kind])
  scope = 'sequence' if hf_values.flag(hf, 'seq_aux', True) else 'micro_batch'
  losses = {key: moe['balance'][key] | {'weight': 0.0} for key in moe_config.LOSSES}
  losses[name] = {'weight': weight, 'scope': scope}
  moe['balance'] = moe['balance'] | losses
