"""Tiny Hugging Face checkpoints of every family, made from the published names alone.

Nothing here comes from `moe_jax.interop`: the names and shapes are written out a second time, and
the files are written by the safetensors package.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

V, D, HEADS, LAYERS, MLP, EXPERT, EXPERTS, SHARED = 32, 16, 2, 3, 24, 8, 8, 2
HEAD_DIM, NOPE, ROPE, V_DIM, Q_LORA, KV_LORA = 8, 8, 4, 6, 12, 10
YARN = {
  'type': 'yarn',
  'factor': 40,
  'original_max_position_embeddings': 4096,
  'beta_fast': 32,
  'beta_slow': 1,
  'mscale': 0.707,
  'mscale_all_dim': 0.707,
}
COMMON = {
  'vocab_size': V,
  'max_position_embeddings': 64,
  'hidden_size': D,
  'intermediate_size': MLP,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': HEADS,
  'num_key_value_heads': HEADS,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000,
  'rope_scaling': None,
  'initializer_range': 0.02,
  'hidden_act': 'silu',
  'attention_bias': False,
  'attention_dropout': 0.0,
  'tie_word_embeddings': False,
  'bos_token_id': 0,
  'eos_token_id': 1,
  'torch_dtype': 'bfloat16',
}
MOE = {
  'n_routed_experts': EXPERTS,
  'n_shared_experts': SHARED,
  'num_experts_per_tok': 2,
  'moe_intermediate_size': EXPERT,
  'first_k_dense_replace': 1,
  'moe_layer_freq': 1,
  'norm_topk_prob': False,
  'scoring_func': 'softmax',
  'aux_loss_alpha': 0.001,
  'seq_aux': True,
}
MLA = {
  'q_lora_rank': Q_LORA,
  'kv_lora_rank': KV_LORA,
  'qk_nope_head_dim': NOPE,
  'qk_rope_head_dim': ROPE,
  'v_head_dim': V_DIM,
  'rope_scaling': YARN,
}
V2 = COMMON | MOE | MLA | {'model_type': 'deepseek_v2', 'routed_scaling_factor': 16.0}
HF = {
  'llama': COMMON | {'model_type': 'llama', 'num_key_value_heads': 1},
  'deepseek': COMMON | MOE | {'model_type': 'deepseek'},
  'deepseek_v2_lite': V2
  | {'q_lora_rank': None, 'topk_method': 'greedy', 'n_group': 1, 'topk_group': 1},
  'deepseek_v2': V2 | {'topk_method': 'group_limited_greedy', 'n_group': 4, 'topk_group': 2},
  'deepseek_v3': COMMON
  | MOE
  | MLA
  | {
    'model_type': 'deepseek_v3',
    'n_shared_experts': 1,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'n_group': 4,
    'topk_group': 2,
    'norm_topk_prob': True,
    'routed_scaling_factor': 2.5,
    'num_nextn_predict_layers': 1,
  },
}
ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'deepseek': 'DeepseekForCausalLM',
  'deepseek_v2': 'DeepseekV2ForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
}


def config(family: str, **changes) -> dict:
  """A config.json."""
  hf = HF[family] | changes
  return {'architectures': [ARCHITECTURES[hf['model_type']]]} | hf


def _attention(hf: dict) -> dict[str, tuple[int, ...]]:
  heads, kv_heads = hf['num_attention_heads'], hf['num_key_value_heads']
  if 'kv_lora_rank' not in hf:
    size = hf.get('head_dim') or D // heads
    shapes = {'q': (heads * size, D), 'k': (kv_heads * size, D), 'v': (kv_heads * size, D)}
    shapes['o'] = (D, heads * size)
    return {f'self_attn.{k}_proj.weight': shape for k, shape in shapes.items()}
  shapes = {
    'kv_a_proj_with_mqa.weight': (KV_LORA + ROPE, D),
    'kv_a_layernorm.weight': (KV_LORA,),
    'kv_b_proj.weight': (heads * (NOPE + V_DIM), KV_LORA),
    'o_proj.weight': (D, heads * V_DIM),
  }
  if hf['q_lora_rank']:
    shapes |= {
      'q_a_proj.weight': (Q_LORA, D),
      'q_a_layernorm.weight': (Q_LORA,),
      'q_b_proj.weight': (heads * (NOPE + ROPE), Q_LORA),
    }
  else:
    shapes['q_proj.weight'] = (heads * (NOPE + ROPE), D)
  return {f'self_attn.{name}': shape for name, shape in shapes.items()}


def _ffn(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
  return {
    f'{prefix}gate_proj.weight': (width, D),
    f'{prefix}up_proj.weight': (width, D),
    f'{prefix}down_proj.weight': (D, width),
  }


def _moe(hf: dict, fused: bool) -> dict[str, tuple[int, ...]]:
  shapes = {'mlp.gate.weight': (EXPERTS, D)}
  shapes |= _ffn('mlp.shared_experts.', hf['n_shared_experts'] * EXPERT)
  if hf['model_type'] == 'deepseek_v3':
    shapes['mlp.gate.e_score_correction_bias'] = (EXPERTS,)
  if fused:
    return shapes | {
      'mlp.experts.gate_up_proj': (EXPERTS, 2 * EXPERT, D),
      'mlp.experts.down_proj': (EXPERTS, D, EXPERT),
    }
  for expert in range(EXPERTS):
    shapes |= _ffn(f'mlp.experts.{expert}.', EXPERT)
  return shapes


def shapes(hf: dict, *, fused: bool = False, mtp: bool = True) -> dict[str, tuple[int, ...]]:
  """Shape by name."""
  found = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not hf['tie_word_embeddings']:
    found['lm_head.weight'] = (V, D)
  modules = hf.get('num_nextn_predict_layers', 0) if mtp else 0
  for layer in range(LAYERS + modules):
    own = {'input_layernorm.weight': (D,), 'post_attention_layernorm.weight': (D,)}
    own |= _attention(hf)
    is_moe = hf.get('n_routed_experts') and layer >= hf['first_k_dense_replace']
    own |= _moe(hf, fused) if is_moe else _ffn('mlp.', MLP)
    if layer >= LAYERS:
      own |= {'embed_tokens.weight': (V, D), 'shared_head.head.weight': (V, D)}
      own |= {'enorm.weight': (D,), 'hnorm.weight': (D,), 'shared_head.norm.weight': (D,)}
      own |= {'eh_proj.weight': (D, 2 * D)}
    found |= {f'model.layers.{layer}.{name}': shape for name, shape in own.items()}
  return found


def tensors(hf: dict, dtype=ml_dtypes.bfloat16, **options) -> dict[str, np.ndarray]:
  """Random values; the copies in a prediction module are equal to what they repeat."""
  rng = np.random.default_rng(0)
  made = {}
  for name, shape in shapes(hf, **options).items():
    of = np.float32 if name.endswith('correction_bias') else dtype
    made[name] = rng.normal(size=shape).astype(of)
  for name in made:
    if name.startswith('model.layers.') and name.endswith('.embed_tokens.weight'):
      made[name] = made['model.embed_tokens.weight']
    elif name.endswith('shared_head.head.weight'):
      made[name] = made['lm_head.weight']
  return made


def quantise(weights: dict[str, np.ndarray], block: int) -> dict[str, np.ndarray]:
  """The projections of layers in float8, with a scale per block."""
  rng, made = np.random.default_rng(1), dict(weights)
  for name, weight in weights.items():
    if 'layers' in name and '_proj' in name and 'eh_proj' not in name:
      made[name] = rng.normal(size=weight.shape).astype(ml_dtypes.float8_e4m3fn)
      scales = [-(-size // block) for size in weight.shape]
      made[f'{name}_scale_inv'] = rng.uniform(0.5, 2.0, scales).astype(np.float32)
  return made


def write_file(path: pathlib.Path, weights: dict[str, np.ndarray]):
  """One *.safetensors file."""
  contiguous = {name: np.ascontiguousarray(x) for name, x in weights.items()}
  safetensors.numpy.save_file(contiguous, path, metadata={'format': 'pt'})


def write(
  directory: pathlib.Path, hf: dict, weights: dict[str, np.ndarray], *, num_shards: int = 1
) -> pathlib.Path:
  """A whole downloaded directory, tokenizer included."""
  directory.mkdir(parents=True)
  (directory / 'config.json').write_text(json.dumps(hf, indent=1))
  generation = {'bos_token_id': 0, 'eos_token_id': 1}
  (directory / 'generation_config.json').write_text(json.dumps(generation))
  tokens = {'bos_token': {'content': '<s>'}, 'eos_token': '</s>', 'add_bos_token': True}
  (directory / 'tokenizer_config.json').write_text(json.dumps(tokens))
  vocab = {'<s>': 0, '</s>': 1} | {chr(97 + i): i + 2 for i in range(26)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(directory / 'tokenizer.json'))
  if num_shards == 1:
    write_file(directory / 'model.safetensors', weights)
    return directory
  weight_map = {}
  for i in range(num_shards):
    file = f'model-{i + 1:05d}-of-{num_shards:05d}.safetensors'
    shard = dict(list(weights.items())[i::num_shards])
    write_file(directory / file, shard)
    weight_map |= dict.fromkeys(shard, file)
  index = {'metadata': {}, 'weight_map': weight_map}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
  return directory


def read(directory: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
  """dtype, shape and bytes of every tensor, read by the safetensors package."""
  found = {}
  for path in sorted(directory.glob('*.safetensors')):
    for name, item in safetensors.deserialize(path.read_bytes()):
      found[name] = (item['dtype'], tuple(item['shape']), bytes(item['data']))
  return found
