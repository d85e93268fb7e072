"""Whether the tensors of a checkpoint are those of its config.json, in config.json's words.

Counts are compared before anything is listed or allocated by them: what config.json claims is work
that the files bound. What differs is named by field, with the value that the files have.
"""

import pathlib
import re
from collections.abc import Mapping

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.interop import mapping, safetensors_files

_LAYER = re.compile(r'^model\.layers\.(\d{1,9})\.(.*)')
_EXPERT = re.compile(r'^mlp\.experts\.(\d{1,9})\.')
_Tensors = Mapping[str, safetensors_files.Tensor]

# What an axis of the tables in `mapping` is in config.json.
_AXIS_FIELDS = {
  'vocab': 'vocab_size',
  'embed': 'hidden_size',
  'twice': '2 hidden_size',
  'heads': 'num_attention_heads',
  'kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim (hidden_size / num_attention_heads if absent)',
  'qk': '(qk_nope_head_dim + qk_rope_head_dim)',
  'v': 'v_head_dim',
  'q_lora': 'q_lora_rank',
  'kv_lora': 'kv_lora_rank',
  'kv_rope': '(kv_lora_rank + qk_rope_head_dim)',
  'kv_v': '(qk_nope_head_dim + v_head_dim)',
  'mlp': 'intermediate_size',
  'experts': 'n_routed_experts',
  'expert_mlp': 'moe_intermediate_size',
  'shared_mlp': 'n_shared_experts moe_intermediate_size',
}


def check_counts(hf: trees.Json, model: schema.ModelConfig, tensors: _Tensors, where: pathlib.Path):
  """Compares layers, experts, ranks and vocabulary with the files.

  Args:
    hf: config.json.
    model: what it says, with the prediction modules that the files hold.
    tensors: of the files, by name.
    where: the directory, for messages.

  Raises:
    errors.InputError: a number is not that of the files; names the field and both.
  """
  layers = _layers(tensors)
  gated = [i for i, names in layers.items() if 'mlp.gate.weight' in names]
  vocab, width = _matrix(tensors.get('model.embed_tokens.weight'))
  moe, mla = model.moe, model.attention.mla
  ranks = (mla.q_lora_rank, mla.kv_lora_rank) if model.attention.kind == 'mla' else (0, 0)
  shared = any(n.startswith('mlp.shared_experts.') for names in layers.values() for n in names)
  found = (
    ('num_hidden_layers', model.num_layers, max(layers, default=-1) + 1 - model.num_mtp_layers),
    ('vocab_size', model.vocab_size, vocab),
    ('hidden_size', model.embed_dim, width),
    ('n_routed_experts', moe.num_experts, _num_experts(layers, tensors)),
    ('first_k_dense_replace', model.num_dense_layers, min(gated) if gated else None),
    ('n_shared_experts', moe.num_shared_experts, moe.num_shared_experts or 1 if shared else 0),
    ('q_lora_rank', ranks[0], _rank(tensors, '.self_attn.q_a_layernorm.weight')),
    ('kv_lora_rank', ranks[1], _rank(tensors, '.self_attn.kv_a_layernorm.weight')),
  )
  for field, value, in_files in found:
    errors.require(
      in_files in (None, value),
      f'config.json: {field}={hf.get(field)!r}, but the files in {where} have {in_files}; '
      'correct config.json, or download the files that are missing',
    )


def fields(model: schema.ModelConfig, name: str) -> str:
  """What decides the shape of a tensor, in fields of config.json: 'vocab_size x hidden_size'."""
  axes = mapping.file_axes(model, name)
  return ' x '.join(' '.join(_AXIS_FIELDS[axis] for axis in group) for group in axes)


def _layers(tensors: _Tensors) -> dict[int, list[str]]:
  """The names of the tensors of every layer, without their prefix."""
  layers: dict[int, list[str]] = {}
  for name in tensors:
    if match := _LAYER.match(name):
      layers.setdefault(int(match[1]), []).append(match[2])
  return layers


def _matrix(tensor: safetensors_files.Tensor | None) -> tuple[int | None, int | None]:
  """Rows and columns; None without a matrix."""
  if tensor is None or len(tensor.shape) != 2:
    return None, None
  return tensor.shape[0], tensor.shape[1]


def _rank(tensors: _Tensors, suffix: str) -> int:
  """Length of the first vector whose name ends so; 0 without one."""
  found = (t.shape for name, t in tensors.items() if name.endswith(suffix) and len(t.shape) == 1)
  return next(found, (0,))[0]


def _num_experts(layers: Mapping[int, list[str]], tensors: _Tensors) -> int:
  """Experts of a layer, in tensors of their own or in one."""
  matches = (_EXPERT.match(name) for names in layers.values() for name in names)
  numbers = [int(match[1]) + 1 for match in matches if match]
  stacks = (t.shape for n, t in tensors.items() if n.endswith('.mlp.experts.gate_up_proj'))
  return max([*numbers, *(shape[0] for shape in stacks if shape)], default=0)
