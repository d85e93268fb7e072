"""DeepSeekMoE's model (`model_type` deepseek, arXiv 2401.06066) in torch, as plain functions.

transformers has no class for it. This one is written from the paper and from what the released code
is known to do, reads the published names, and shares nothing with `moe_jax`. Letters: B batch, L
length, D embed, E experts, K experts per token.
"""

import json
import pathlib

import safetensors.torch
import torch
from torch.nn import functional

Weights = dict[str, torch.Tensor]


def load(directory: pathlib.Path) -> tuple[dict, Weights]:
  """config.json and all tensors of a checkpoint."""
  hf = json.loads((directory / 'config.json').read_text())
  weights = {}
  for path in directory.glob('*.safetensors'):
    # Where a tensor begins in the mapped file depends on the header's length, and products of
    # unaligned matrices may sum in another order: copies begin where torch puts them.
    weights |= {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
  return hf, weights


def forward(hf: dict, weights: Weights, tokens: torch.Tensor) -> tuple[torch.Tensor, list]:
  """tokens [B, L] -> (logits [B, L, V], chosen experts [B * L, K] of every MoE layer)."""
  x = weights['model.embed_tokens.weight'][tokens]
  chosen = []
  for layer in range(hf['num_hidden_layers']):
    prefix = f'model.layers.{layer}.'
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    x = x + attention(hf, own, rms_norm(hf, own['input_layernorm.weight'], x))
    u = rms_norm(hf, own['post_attention_layernorm.weight'], x)
    if layer < hf['first_k_dense_replace']:
      x = x + swiglu(own, 'mlp.', u)
    else:
      update, experts = moe(hf, own, u)
      x = x + update
      chosen.append(experts)
  x = rms_norm(hf, weights['model.norm.weight'], x)
  return (x @ weights['lm_head.weight'].T).float(), chosen


def rms_norm(hf: dict, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
  """Normed in float32, rounded, then scaled."""
  x32 = x.float()
  normed = x32 / torch.sqrt((x32 * x32).mean(-1, keepdim=True) + hf['rms_norm_eps'])
  return normed.to(x.dtype) * weight


def attention(hf: dict, own: Weights, x: torch.Tensor) -> torch.Tensor:
  """Multi-head attention with as many keys as queries, rotated in halves."""
  heads = hf['num_attention_heads']
  batch, length, width = x.shape
  size = width // heads
  q, k, v = (
    (x @ own[f'self_attn.{name}_proj.weight'].T).view(batch, length, heads, size).transpose(1, 2)
    for name in 'qkv'
  )
  q, k = rotate(hf, q), rotate(hf, k)
  scores = q @ k.transpose(-1, -2) / size**0.5
  future = torch.ones(length, length, dtype=torch.bool).triu(1)
  scores = scores.masked_fill(future, float('-inf'))
  mixed = torch.softmax(scores.float(), dim=-1).to(x.dtype) @ v
  return mixed.transpose(1, 2).reshape(batch, length, width) @ own['self_attn.o_proj.weight'].T


def rotate(hf: dict, x: torch.Tensor) -> torch.Tensor:
  """RoPE on x [B, heads, L, H]: pair i is (i, i + H/2), turned by position * theta^(-2i/H)."""
  half = x.shape[-1] // 2
  freq = hf['rope_theta'] ** (-torch.arange(half, dtype=torch.float32) / half)
  angle = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * freq
  turn = torch.polar(torch.ones_like(angle), angle)
  turned = torch.complex(x[..., :half].float(), x[..., half:].float()) * turn
  return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def swiglu(own: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
  """down(silu(gate(x)) * up(x))."""
  gate, up, down = (own[f'{prefix}{name}_proj.weight'] for name in ('gate', 'up', 'down'))
  return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(hf: dict, own: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """Shared experts + the best K of the routed ones, one token and one expert at a time.

  The gate is a softmax over all experts in the model's dtype, without a scaling factor.
  """
  flat = x.reshape(-1, x.shape[-1])
  scores = torch.softmax(flat @ own['mlp.gate.weight'].T, dim=-1)
  gates, experts = torch.topk(scores, hf['num_experts_per_tok'], dim=-1)
  if hf['norm_topk_prob'] and hf['num_experts_per_tok'] > 1:
    gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
  rows = []
  for token in range(len(flat)):
    parts = zip(gates[token], experts[token].tolist())
    rows.append(sum(g * swiglu(own, f'mlp.experts.{e}.', flat[token]) for g, e in parts))
  routed = torch.stack(rows)
  if hf.get('n_shared_experts'):
    routed = routed + swiglu(own, 'mlp.shared_experts.', flat)
  return routed.view_as(x), experts
