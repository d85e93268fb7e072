"""Tiny random models that transformers makes and saves, and what both sides compute from them.

`CASES` has every structure that the DeepSeek families differ in. `measure` runs one through both
programs: theirs is transformers, except for the family that it has no class for
(`torch_deepseek.py`), and for DeepSeek-V2's gate with norm_topk_prob, which it ignores
(`use_released_gate`). Nothing is downloaded.
"""

import functools
import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.torch
import torch
import transformers

from configs import base
from experiments.parity import torch_deepseek
from moe_jax.config import schema
from moe_jax.interop import huggingface
from moe_jax.models import transformer

VOCAB, LENGTH, ROWS = 96, 48, 2

COMMON = {
  'vocab_size': VOCAB,
  'max_position_embeddings': 128,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
}
MOE = {
  'n_routed_experts': 8,
  'n_shared_experts': 2,
  'num_experts_per_tok': 3,
  'moe_intermediate_size': 16,
  'first_k_dense_replace': 1,
  'norm_topk_prob': False,
  'aux_loss_alpha': 0.0,
}
MLA = {
  'q_lora_rank': 24,
  'kv_lora_rank': 20,
  'qk_nope_head_dim': 12,
  'qk_rope_head_dim': 16,
  'v_head_dim': 10,
}
# Of the 8 rotated pairs 2 keep their frequency, 1 lies between, 5 are slowed down by 4; and two
# thirds of the sequence are as long as the original length.
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 100.0,
  'factor': 4.0,
  'original_max_position_embeddings': 32,
  'beta_fast': 2.0,
  'beta_slow': 1.0,
}
# The released constants, but for the original length.
RELEASED_YARN = YARN | {'rope_theta': 10000.0, 'factor': 40.0, 'beta_fast': 32.0}
RELEASED_YARN |= {'original_max_position_embeddings': 16, 'mscale': 0.707, 'mscale_all_dim': 0.707}

GREEDY = {'topk_method': 'greedy', 'n_group': 1, 'topk_group': 1}
GROUPS = {'n_group': 4, 'topk_group': 2}
GROUP_LIMITED = {'topk_method': 'group_limited_greedy', 'routed_scaling_factor': 16.0}
LLAMA = COMMON | {'model_type': 'llama'}
V1 = COMMON | MOE | {'model_type': 'deepseek', 'rope_theta': 10000.0}
V2 = COMMON | MOE | MLA | {'model_type': 'deepseek_v2', 'routed_scaling_factor': 1.0} | GREEDY
V3 = COMMON | MOE | MLA | GROUPS | {'model_type': 'deepseek_v3', 'routed_scaling_factor': 2.5}
V3 |= {'norm_topk_prob': True, 'n_shared_experts': 1}


def _yarn(mscale: float) -> dict[str, Any]:
  return {'rope_parameters': YARN | {'mscale': mscale, 'mscale_all_dim': mscale}}


CASES: Mapping[str, dict[str, Any]] = {
  'llama_mha': LLAMA,
  'llama_gqa': LLAMA | {'num_key_value_heads': 2, 'rms_norm_eps': 1e-5},
  'llama_head_dim': LLAMA | {'num_key_value_heads': 1, 'head_dim': 14},
  'llama_tied': LLAMA | {'tie_word_embeddings': True},
  'llama_yarn': LLAMA | {'rope_parameters': YARN, 'head_dim': 16},
  'deepseek': V1,
  'deepseek_norm': V1 | {'norm_topk_prob': True},
  'v2_lite': V2 | {'q_lora_rank': None, 'rope_parameters': RELEASED_YARN},
  'v2': V2 | GROUPS | _yarn(1.0) | GROUP_LIMITED | {'rms_norm_eps': 1e-5},
  'v2_no_yarn': V2 | {'routed_scaling_factor': 2.5},
  'v2_no_lora_no_yarn': V2 | {'q_lora_rank': None, 'n_shared_experts': 1},
  'v2_norm': V2 | {'norm_topk_prob': True, 'routed_scaling_factor': 2.5},
  'v3': V3 | _yarn(1.0) | {'rms_norm_eps': 1e-5},
  'v3_no_norm': V3 | {'norm_topk_prob': False, 'q_lora_rank': None},
  'v3_one_group': V3 | _yarn(0.707) | {'n_group': 1, 'topk_group': 1},
  'v3_plain_yarn': V3 | {'rope_parameters': YARN},
  'v3_half_rope': V3 | {'rope_interleave': False},
}

# transformers ignores norm_topk_prob in DeepSeek-V2; the released code does not.
RELEASED_GATE = ('v2_norm',)


class Logits(NamedTuple):
  """What a model says about `tokens`."""

  logits: np.ndarray  # [B, L, V] float32
  experts: np.ndarray  # [MoE layers, B * L, K] int, sorted by number


class Measured(NamedTuple):
  """A case run through both programs."""

  theirs: Logits
  ours: Logits
  exported: Logits  # theirs, with the files that we wrote


def tokens() -> np.ndarray:
  """[B, L] int32."""
  return np.random.default_rng(1).integers(VOCAB, size=(ROWS, LENGTH)).astype(np.int32)


def one_thread():
  """Lets torch use one core: matrices are tiny, and sums in one order can be compared exactly."""
  torch.set_num_threads(1)


def measure(name: str, directory: pathlib.Path) -> Measured:
  """Saves the checkpoint of a case in directory/saved, imports, exports to directory/exported."""
  saved, exported = directory / 'saved', directory / 'exported'
  make(name, saved)
  cfg, variables = huggingface.load_variables(saved, base.get_config().to_dict())
  huggingface.save(cfg, variables, exported)
  return Measured(reference(name, saved), ours(cfg, variables), reference(name, exported))


def make(name: str, directory: pathlib.Path, dtype: torch.dtype = torch.float32, **changes):
  """Writes config.json and model.safetensors of a case with random weights.

  Weights are large (standard deviation 0.25, routers 0.4) so that attention, routing and logits
  are far from uniform; biases of experts have both signs and outweigh most scores.
  """
  values = CASES[name] | changes
  if values['model_type'] == 'deepseek':
    _make_v1(values, directory, dtype)
    return
  model = _empty(values)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight_name, weight in [*model.named_parameters(), *model.named_buffers()]:
      if weight_name.endswith('weight') or weight_name.endswith('_proj'):
        weight.copy_(_draw(weight_name, tuple(weight.shape), generator))
      elif weight_name.endswith('e_score_correction_bias'):
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5 - 0.3)
  model.to(dtype)
  for gate in gates(model):
    if hasattr(gate, 'e_score_correction_bias'):  # released files and transformers keep it wide
      gate.e_score_correction_bias.data = gate.e_score_correction_bias.data.float()
  model.save_pretrained(directory)


def _empty(values: Mapping[str, Any]) -> transformers.PreTrainedModel:
  values = dict(values)
  hf = transformers.AutoConfig.for_model(values.pop('model_type'), **values)
  return transformers.AutoModelForCausalLM.from_config(hf, attn_implementation='eager')


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
  noise = torch.randn(shape, generator=generator)
  if len(shape) == 1:
    return 1 + 0.2 * noise
  return noise * (0.4 if name.endswith('mlp.gate.weight') else 0.25)


def _make_v1(values: dict[str, Any], directory: pathlib.Path, dtype: torch.dtype):
  d, experts = values['hidden_size'], values['n_routed_experts']

  def ffn(prefix, width):
    return {
      f'{prefix}gate_proj.weight': (width, d),
      f'{prefix}up_proj.weight': (width, d),
      f'{prefix}down_proj.weight': (d, width),
    }

  shapes = {'model.embed_tokens.weight': (VOCAB, d), 'lm_head.weight': (VOCAB, d)}
  shapes['model.norm.weight'] = (d,)
  for layer in range(values['num_hidden_layers']):
    own = {f'self_attn.{name}_proj.weight': (d, d) for name in 'qkvo'}
    own |= {'input_layernorm.weight': (d,), 'post_attention_layernorm.weight': (d,)}
    if layer < values['first_k_dense_replace']:
      own |= ffn('mlp.', values['intermediate_size'])
    else:
      width = values['moe_intermediate_size']
      own |= ffn('mlp.shared_experts.', values['n_shared_experts'] * width)
      own['mlp.gate.weight'] = (experts, d)
      for expert in range(experts):
        own |= ffn(f'mlp.experts.{expert}.', width)
    shapes |= {f'model.layers.{layer}.{name}': shape for name, shape in own.items()}
  generator = torch.Generator().manual_seed(0)
  weights = {name: _draw(name, shape, generator).to(dtype) for name, shape in shapes.items()}
  directory.mkdir(parents=True)
  safetensors.torch.save_file(weights, directory / 'model.safetensors')
  hf = {k: v for k, v in values.items() if k != 'rope_parameters'}
  hf |= {'rope_scaling': None, 'architectures': ['DeepseekForCausalLM']}
  (directory / 'config.json').write_text(json.dumps(hf))


def add_prediction_module(directory: pathlib.Path):
  """Adds a random module of multi-token prediction to the files of a V3 model."""
  path, generator = directory / 'model.safetensors', torch.Generator().manual_seed(1)
  weights = safetensors.torch.load_file(path)
  last, d = COMMON['num_hidden_layers'] - 1, COMMON['hidden_size']
  shapes = {'enorm': (d,), 'hnorm': (d,), 'shared_head.norm': (d,), 'eh_proj': (d, 2 * d)}
  own = {f'{name}.weight': _draw(name, shape, generator) for name, shape in shapes.items()}
  copies = {'embed_tokens': 'model.embed_tokens', 'shared_head.head': 'lm_head'}
  own |= {f'{to}.weight': weights[f'{name}.weight'].clone() for to, name in copies.items()}
  for name, weight in weights.items():
    head, _, tail = name.partition(f'model.layers.{last}.')
    if not head:
      own[tail] = _draw(tail, tuple(weight.shape), generator)
  weights |= {f'model.layers.{last + 1}.{name}': weight for name, weight in own.items()}
  safetensors.torch.save_file(weights, path, metadata={'format': 'pt'})


def load_theirs(name: str, directory: pathlib.Path) -> transformers.PreTrainedModel:
  """The files as transformers reads them, for evaluation."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory,
    dtype='auto',
    attn_implementation='eager',
    local_files_only=True,
    output_loading_info=True,
  )
  wrong = {key: sorted(found) for key, found in info.items() if found}
  if wrong:
    raise AssertionError(f'{directory}: transformers did not load everything: {wrong}')
  if name in RELEASED_GATE:
    use_released_gate(model)
  return model.eval()


def gates(model: transformers.PreTrainedModel) -> list[torch.nn.Module]:
  """The routers of its MoE layers."""
  return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, 'gate')]


def reference(name: str, directory: pathlib.Path) -> Logits:
  """`tokens` through transformers, or through `torch_deepseek`."""
  ids = torch.from_numpy(tokens()).long()
  if CASES[name]['model_type'] == 'deepseek':
    logits, chosen = torch_deepseek.forward(*torch_deepseek.load(directory), ids)
    return _logits(logits, chosen)
  return theirs(load_theirs(name, directory))


@torch.no_grad()
def theirs(model: transformers.PreTrainedModel) -> Logits:
  """`tokens` through a model of transformers."""
  chosen = []

  def keep(module, args, out):
    return chosen.append(out[2])

  hooks = [gate.register_forward_hook(keep) for gate in gates(model)]
  logits = model(torch.from_numpy(tokens()).long(), use_cache=False).logits
  for hook in hooks:
    hook.remove()
  return _logits(logits, chosen)


def _logits(logits: torch.Tensor, chosen: list[torch.Tensor]) -> Logits:
  experts = torch.stack(chosen).sort(-1).values if chosen else torch.empty(0)
  return Logits(logits.detach().float().numpy(), experts.numpy())


def ours(cfg: schema.Config, variables: Mapping[str, Any]) -> Logits:
  """`tokens` through this project's model."""
  ids = tokens()
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
  apply = functools.partial(transformer.Transformer(cfg.model).apply, mutable='intermediates')
  apply = jax.jit(apply, compiler_options={'xla_backend_optimization_level': 0})
  out, sown = apply(variables, ids, positions, np.ones_like(ids))
  experts = np.empty(0)
  if cfg.model.is_moe:
    (experts,) = sown['intermediates']['moe_layers']['moe']['expert_idx']
    experts = np.sort(np.asarray(experts).reshape(len(experts), ids.size, -1), axis=-1)
  return Logits(np.asarray(out.logits), experts)


def use_released_gate(model: transformers.PreTrainedModel):
  """Makes DeepSeek-V2's gates do what the released code does with norm_topk_prob.

  It divides the gates by their sum OR multiplies them by routed_scaling_factor; transformers does
  the second always. Greedy selection only.
  """

  def forward(gate: torch.nn.Module, hidden: torch.Tensor):
    hf = model.config
    logits = hidden.view(-1, hidden.shape[-1]).float() @ gate.weight.float().T
    weights, experts = torch.topk(logits.softmax(-1), hf.num_experts_per_tok, dim=-1)
    if hf.norm_topk_prob:
      weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
      weights = weights * hf.routed_scaling_factor
    return logits, weights, experts

  for gate in gates(model):
    gate.forward = types.MethodType(forward, gate)
