"""Our config -> config.json, for the models that one of the DeepSeek families can run."""

from collections.abc import Iterator
from typing import Any

from moe_jax import errors
from moe_jax.config import attention_config, router_traits, schema
from moe_jax.interop import hf_config

_Rule = tuple[str, Any, bool]  # name of a field, its value, whether the family has it


def family_of(cfg: schema.ModelConfig) -> str:
  """The family whose files can hold this model.

  Raises:
    errors.InputError: none can; says what stands in the way.
  """
  mla = cfg.attention.kind == 'mla'
  if mla:
    sigmoid = cfg.is_moe and cfg.moe.score_func == 'sigmoid'
    kind = 'deepseek_v3' if sigmoid else 'deepseek_v2'
  else:
    kind = 'deepseek' if cfg.is_moe else 'llama'
  for name, value, fits in (
    *_layer_rules(cfg, kind),
    *(_moe_rules(cfg, kind) if cfg.is_moe else ()),
  ):
    errors.require(
      fits,
      f'config.model.{name}={value!r} cannot be said in a config.json of model_type {kind!r}, the '
      'nearest to this model; only a model that one of the families can run is exported',
    )
  return kind


def _layer_rules(cfg: schema.ModelConfig, kind: str) -> Iterator[_Rule]:
  attention, mla = cfg.attention, cfg.attention.kind == 'mla'
  rope, width = attention.rope, attention.head_dim * cfg.num_heads
  layouts = {'deepseek_v2': ('interleaved',), 'deepseek_v3': attention_config.ROPE_LAYOUTS}
  both = mla and bool(rope.yarn.mscale and rope.yarn.mscale_all_dim)
  yield 'attention.num_experts', attention.num_experts, attention.num_experts == 0
  yield 'attention.rope.layout', rope.layout, rope.layout in layouts.get(kind, ('half',))
  yield 'attention.rope.yarn', rope.yarn, rope.yarn.factor == 1 or both or _plain(rope.yarn)
  yield 'attention.head_dim', attention.head_dim, kind != 'deepseek' or width == cfg.embed_dim
  yield 'num_mtp_layers', cfg.num_mtp_layers, kind == 'deepseek_v3' or not cfg.num_mtp_layers


def _moe_rules(cfg: schema.ModelConfig, kind: str) -> Iterator[_Rule]:
  moe, v3, mla = cfg.moe, kind == 'deepseek_v3', cfg.attention.kind == 'mla'
  bias, capacity = moe.expert_bias, moe.capacity
  biased, one_group = bias.update_rule != 'none', moe.num_expert_groups == 1
  unscaled = moe.routed_scaling_factor == 1
  yield 'moe.router', moe.router, router_traits.of(moe).exports
  yield 'moe.score_func', moe.score_func, mla or moe.score_func == 'softmax'
  yield 'moe.expert_bias.update_rule', bias.update_rule, biased == v3
  yield 'moe.expert_bias.form', bias.form, not biased or bias.form == 'additive'
  norm = moe.options.logit_norm_scale
  yield 'moe.options.logit_norm_scale', norm, norm == 0
  drops = capacity.policy != 'none' and capacity.at_eval
  yield 'moe.capacity.at_eval', capacity.at_eval, not drops
  # Groups are a view of the scores, and a group counts by its best two experts (V3) or one.
  each, rest = divmod(moe.num_experts, moe.num_expert_groups)
  groups = mla and not rest and each >= (2 if v3 else 1)
  yield 'moe.num_expert_groups', moe.num_expert_groups, one_group or groups
  # A single gate is not divided by its sum, which would make it 1, but by V3 in transformers.
  divided = moe.norm_topk_prob and moe.num_experts_per_tok == 1
  yield 'moe.norm_topk_prob', moe.norm_topk_prob, v3 or not divided
  group_score = 'top2_sum' if v3 else 'max'
  yield 'moe.group_score', moe.group_score, one_group or moe.group_score == group_score
  # V2's code divides the gates or scales them; that of DeepSeekMoE never scales.
  scales = v3 or unscaled or (mla and not moe.norm_topk_prob)
  yield 'moe.routed_scaling_factor', moe.routed_scaling_factor, scales


def _plain(yarn: attention_config.YarnConfig) -> bool:
  """YaRN as its paper has it, which files say by leaving both scales out."""
  return yarn.mscale == 1 and yarn.mscale_all_dim == 0


def caveats(cfg: schema.ModelConfig) -> list[str]:
  """Where readers of the exported model do not agree with the released code, a line each."""
  lines = []
  if family_of(cfg) == 'deepseek_v2' and cfg.is_moe and cfg.moe.norm_topk_prob:
    lines.append(
      'gates are divided by their sum (norm_topk_prob=true), as the released code of DeepSeek-V2 '
      'does; transformers ignores the field there, and would compute another model'
    )
  if cfg.is_moe and not cfg.moe.num_shared_experts and cfg.attention.kind == 'mla':
    lines.append(
      'there are no shared experts (n_shared_experts=0): transformers makes empty ones, and calls '
      'their weights missing'
    )
  if cfg.embed_dim % cfg.num_heads:
    lines.append(
      f'hidden_size={cfg.embed_dim} is no multiple of num_attention_heads={cfg.num_heads}, which '
      'transformers 5.24 refuses to load, though heads have a width of their own'
    )
  return lines


def from_config(cfg: schema.Config) -> dict[str, Any]:
  """A config.json for a model of ours; without the ids of special tokens and the dtype.

  Raises:
    errors.InputError: see `family_of`.
  """
  model, kind = cfg.model, family_of(cfg.model)
  hf = {
    'architectures': [hf_config.ARCHITECTURES[kind]],
    'model_type': kind,
    'vocab_size': model.vocab_size,
    'max_position_embeddings': model.max_seq_len,
    'hidden_size': model.embed_dim,
    'intermediate_size': model.mlp_dim,
    'num_hidden_layers': model.num_layers,
    'num_attention_heads': model.num_heads,
    'rms_norm_eps': model.norm_eps,
    'initializer_range': model.init_std,
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'tie_word_embeddings': model.tie_embeddings,
    'use_cache': True,
  }
  if kind == 'deepseek':  # transformers has no code of its own for it
    repository = 'deepseek-ai/deepseek-moe-16b-base--'
    hf['auto_map'] = {
      'AutoConfig': f'{repository}configuration_deepseek.DeepseekConfig',
      'AutoModelForCausalLM': f'{repository}modeling_deepseek.DeepseekForCausalLM',
    }
  return hf | _from_attention(kind, model) | ({} if kind == 'llama' else _from_moe(kind, model))


def _from_attention(kind: str, model: schema.ModelConfig) -> dict[str, Any]:
  attention = model.attention
  rope, mla = attention.rope, attention.mla
  hf = {'rope_theta': rope.theta, 'rope_scaling': None}
  if rope.yarn.factor > 1:
    hf['rope_scaling'] = {
      'type': 'yarn',
      'rope_type': 'yarn',
      'factor': rope.yarn.factor,
      'original_max_position_embeddings': rope.yarn.original_max_seq_len,
      'beta_fast': rope.yarn.beta_fast,
      'beta_slow': rope.yarn.beta_slow,
    }
    if not _plain(rope.yarn):
      hf['rope_scaling'] |= {
        'mscale': rope.yarn.mscale,
        'mscale_all_dim': rope.yarn.mscale_all_dim,
      }
  if attention.kind == 'gqa':
    hf['num_key_value_heads'] = attention.num_kv_heads
    return hf | ({'head_dim': attention.head_dim} if kind == 'llama' else {})
  hf |= {
    'num_key_value_heads': model.num_heads,
    'q_lora_rank': mla.q_lora_rank or None,
    'kv_lora_rank': mla.kv_lora_rank,
    'qk_nope_head_dim': mla.qk_nope_head_dim,
    'qk_rope_head_dim': mla.qk_rope_head_dim,
    'v_head_dim': mla.v_head_dim,
  }
  return hf | ({'rope_interleave': rope.layout == 'interleaved'} if kind == 'deepseek_v3' else {})


def _from_moe(kind: str, model: schema.ModelConfig) -> dict[str, Any]:
  moe = model.moe
  if not model.is_moe:
    return {'first_k_dense_replace': model.num_layers}  # there is no family of dense MLA
  loss = moe.balance.normalized_expert_level if kind == 'deepseek_v3' else moe.balance.expert_level
  hf = {
    'n_routed_experts': moe.num_experts,
    'n_shared_experts': moe.num_shared_experts,
    'num_experts_per_tok': moe.num_experts_per_tok,
    'moe_intermediate_size': moe.moe_mlp_dim,
    'first_k_dense_replace': model.num_dense_layers,
    'moe_layer_freq': 1,
    'norm_topk_prob': moe.norm_topk_prob,
    'scoring_func': moe.score_func,
    'aux_loss_alpha': loss.weight,
    'seq_aux': loss.scope == 'sequence',
  }
  if kind == 'deepseek':
    return hf
  grouped = moe.num_expert_groups > 1
  hf |= {
    'routed_scaling_factor': moe.routed_scaling_factor,
    'n_group': moe.num_expert_groups,
    'topk_group': moe.num_limited_groups if grouped else 1,
  }
  if kind == 'deepseek_v2':
    return hf | {'topk_method': 'group_limited_greedy' if grouped else 'greedy'}
  return hf | {'topk_method': 'noaux_tc', 'num_nextn_predict_layers': model.num_mtp_layers}
